//! Write policies for the Zentinel proxy's Wasm agent in Zig. Copy this file into your project.
//!
//!     const std = @import("std");
//!     const zentinel = @import("zentinel");
//!
//!     pub const panic = zentinel.panic;
//!     pub const std_options: std.Options = .{ .logFn = zentinel.logFn };
//!
//!     comptime {
//!         zentinel.exportHooks(.{ .on_request_headers = check });
//!     }
//!
//!     fn check(arena: std.mem.Allocator, request: zentinel.Request) !zentinel.Decision {
//!         _ = arena;
//!         if (std.mem.find(u8, request.uri, "/admin") != null) {
//!             return .{ .decision = .block, .status = 403, .body = "Forbidden" };
//!         }
//!         return .{};
//!     }
//!
//! A hook takes an arena, which is reset after the call, and an event. If it returns an error, that
//! is a module error: the agent logs it, and its failure mode decides.
//!
//! SPDX-License-Identifier: Apache-2.0

const std = @import("std");
const Allocator = std.mem.Allocator;
const json = std.json;

/// The name and value of a header.
pub const Header = struct {
    name: []const u8,
    value: []const u8,
    /// Further values, for headers such as Set-Cookie.
    more: []const []const u8 = &.{},
};

/// Headers in the order of the event. Names are compared case-insensitively.
pub const Headers = struct {
    items: []const Header = &.{},

    /// The value of a header. Multiple values are joined with `; ` for Cookie, otherwise with `, `.
    pub fn get(self: Headers, name: []const u8) ?[]const u8 {
        for (self.items) |header| {
            if (std.ascii.eqlIgnoreCase(header.name, name)) return header.value;
        }
        return null;
    }

    pub fn jsonParse(arena: Allocator, source: anytype, options: json.ParseOptions) !Headers {
        var items: std.ArrayList(Header) = .empty;
        if (try source.next() != .object_begin) return error.UnexpectedToken;
        while (true) {
            switch (try source.nextAlloc(arena, options.allocate.?)) {
                inline .string, .allocated_string => |name| {
                    const value = try json.innerParse([]const u8, arena, source, options);
                    try items.append(arena, .{ .name = name, .value = value });
                },
                .object_end => return .{ .items = items.items },
                else => return error.UnexpectedToken,
            }
        }
    }
};

/// The values of each header that has more than one.
pub const HeaderValues = json.ArrayHashMap([]const []const u8);

/// The encoding of a body.
pub const Encoding = enum { @"utf-8", base64 };

/// The event of `on_request_headers` and `on_request_body`. Only the latter has the body fields.
pub const Request = struct {
    method: []const u8 = "",
    /// The path and query.
    uri: []const u8 = "",
    /// The client's address, without a port.
    client_ip: []const u8 = "",
    /// Identifies the request in logs. The client may have chosen it.
    correlation_id: []const u8 = "",
    headers: Headers = .{},
    header_values: HeaderValues = .{},
    protocol: ?[]const u8 = null,
    server_name: ?[]const u8 = null,
    client_port: ?u64 = null,
    request_id: ?[]const u8 = null,
    route_id: ?[]const u8 = null,
    upstream_id: ?[]const u8 = null,
    timestamp: ?[]const u8 = null,
    traceparent: ?[]const u8 = null,
    tls_version: ?[]const u8 = null,

    body: []const u8 = "",
    body_encoding: Encoding = .@"utf-8",
    chunk_index: u64 = 0,
    is_last: bool = false,
    total_size: ?u64 = null,
    bytes_received: u64 = 0,

    /// The bytes of this chunk of the body.
    pub fn bytes(self: Request, arena: Allocator) ![]const u8 {
        return decode(arena, self.body, self.body_encoding);
    }
};

/// The event of `on_response_headers` and `on_response_body`. Only the latter has the body fields.
pub const Response = struct {
    status: u16 = 0,
    correlation_id: []const u8 = "",
    headers: Headers = .{},
    header_values: HeaderValues = .{},
    /// The method, URI and address of the request, if the agent knows them.
    method: ?[]const u8 = null,
    uri: ?[]const u8 = null,
    client_ip: ?[]const u8 = null,

    body: []const u8 = "",
    body_encoding: Encoding = .@"utf-8",
    chunk_index: u64 = 0,
    is_last: bool = false,
    total_size: ?u64 = null,
    bytes_sent: u64 = 0,

    /// The bytes of this chunk of the body.
    pub fn bytes(self: Response, arena: Allocator) ![]const u8 {
        return decode(arena, self.body, self.body_encoding);
    }
};

/// The event of `on_websocket_frame`.
pub const WebsocketFrame = struct {
    correlation_id: []const u8 = "",
    /// `text`, `binary`, `ping`, `pong`, `close` or `continuation`.
    opcode: []const u8 = "",
    data: []const u8 = "",
    data_encoding: Encoding = .@"utf-8",
    client_to_server: bool = false,
    frame_index: u64 = 0,
    fin: bool = false,
    route_id: ?[]const u8 = null,
    client_ip: []const u8 = "",

    /// The bytes of the payload.
    pub fn bytes(self: WebsocketFrame, arena: Allocator) ![]const u8 {
        return decode(arena, self.data, self.data_encoding);
    }
};

/// The event of `on_guardrail_inspect`.
pub const Guardrail = struct {
    correlation_id: []const u8 = "",
    /// `prompt_injection` or `pii_detection`.
    inspection_type: []const u8 = "",
    content: []const u8 = "",
    model: ?[]const u8 = null,
    categories: []const []const u8 = &.{},
    route_id: ?[]const u8 = null,
    metadata: json.ArrayHashMap([]const u8) = .{},
};

/// The event of `on_request_complete`.
pub const Completion = struct {
    correlation_id: []const u8 = "",
    status: u16 = 0,
    duration_ms: u64 = 0,
    request_body_size: u64 = 0,
    response_body_size: u64 = 0,
    upstream_attempts: u64 = 0,
    @"error": ?[]const u8 = null,
};

/// The change to a chunk of a body.
pub const BodyMutation = union(enum) {
    pass_through,
    /// Replaces the chunk with text.
    replace: []const u8,
    /// Replaces the chunk with bytes, which need not be UTF-8.
    replace_bytes: []const u8,
    /// Drops the chunk. For a response, this is a module error unless the chunk is empty, because
    /// the proxy would send the original.
    drop,

    pub fn jsonStringify(self: BodyMutation, out: anytype) !void {
        try out.beginObject();
        try out.objectField("action");
        switch (self) {
            .pass_through => try out.write("pass_through"),
            .drop => try out.write("drop"),
            .replace => |text| {
                try out.write("replace");
                try out.objectField("data");
                try out.write(text);
            },
            .replace_bytes => |data| {
                try out.write("replace");
                try out.objectField("data_base64");
                try out.beginWriteRaw();
                try out.writer.writeByte('"');
                try std.base64.standard.Encoder.encodeWriter(out.writer, data);
                try out.writer.writeByte('"');
                out.endWriteRaw();
            },
        }
        try out.endObject();
    }
};

/// The decision on a WebSocket frame.
pub const WebsocketDecision = union(enum) {
    drop,
    close: struct { code: u16, reason: []const u8 },

    pub fn jsonStringify(self: WebsocketDecision, out: anytype) !void {
        switch (self) {
            .drop => try out.write("drop"),
            .close => |close| {
                try out.beginObject();
                try out.objectField("close");
                try out.write(close);
                try out.endObject();
            },
        }
    }
};

/// The answer of a hook. The default lets the event pass unchanged.
pub const Decision = struct {
    decision: enum { allow, block, redirect, challenge } = .allow,
    /// The status of a block (200 to 599) or redirect (301, 302, 303, 307 or 308).
    status: ?u16 = null,
    /// The body of a block, or the URL of a redirect.
    body: ?[]const u8 = null,
    challenge_type: ?[]const u8 = null,
    challenge_params: []const Header = &.{},
    add_request_headers: []const Header = &.{},
    /// Appended to the existing values.
    append_request_headers: []const Header = &.{},
    remove_request_headers: []const []const u8 = &.{},
    add_response_headers: []const Header = &.{},
    /// Appended to the existing values, such as the cookies of the upstream.
    append_response_headers: []const Header = &.{},
    remove_response_headers: []const []const u8 = &.{},
    tags: []const []const u8 = &.{},
    rule_ids: []const []const u8 = &.{},
    reason_codes: []const []const u8 = &.{},
    /// From 0 to 1.
    confidence: ?f64 = null,
    routing_metadata: []const Header = &.{},
    /// Marks the decision as not final: the hook for the body decides.
    needs_more: bool = false,
    request_body_mutation: ?BodyMutation = null,
    response_body_mutation: ?BodyMutation = null,
    websocket_decision: ?WebsocketDecision = null,
    /// The verdict of a guardrail inspection.
    guardrail_response: ?json.Value = null,

    /// Writes `decision` and the fields that are set.
    pub fn jsonStringify(self: Decision, out: anytype) !void {
        try out.beginObject();
        inline for (@typeInfo(Decision).@"struct".field_names) |name| {
            const value = @field(self, name);
            switch (@TypeOf(value)) {
                []const Header => if (value.len > 0) {
                    try out.objectField(name);
                    try writePairs(value, comptime namesOf(name), out);
                },
                []const []const u8 => if (value.len > 0) {
                    try out.objectField(name);
                    try out.write(value);
                },
                bool => if (value) {
                    try out.objectField(name);
                    try out.write(true);
                },
                else => |T| if (@typeInfo(T) != .optional or value != null) {
                    try out.objectField(name);
                    try out.write(value);
                },
            }
        }
        try out.endObject();
    }

    /// How to merge pairs of the same name, because a JSON object must not repeat a name.
    const Names = struct { ignoring_case: bool, appending: bool };

    fn namesOf(comptime field: []const u8) Names {
        return .{
            .ignoring_case = !std.mem.eql(u8, field, "routing_metadata"),
            .appending = std.mem.startsWith(u8, field, "append_"),
        };
    }

    fn contains(pairs: []const Header, name: []const u8, ignoring_case: bool) bool {
        for (pairs) |pair| {
            if (sameName(pair.name, name, ignoring_case)) return true;
        }
        return false;
    }

    fn sameName(a: []const u8, b: []const u8, ignoring_case: bool) bool {
        return if (ignoring_case) std.ascii.eqlIgnoreCase(a, b) else std.mem.eql(u8, a, b);
    }

    /// If the pairs are set, the last one of a name wins. If they are appended, all count.
    fn writePairs(pairs: []const Header, names: Names, out: anytype) !void {
        try out.beginObject();
        for (pairs, 0..) |pair, at| {
            const others = if (names.appending) pairs[0..at] else pairs[at + 1 ..];
            if (contains(others, pair.name, names.ignoring_case)) continue;
            try out.objectField(pair.name);
            const rest = pairs[at + 1 ..];
            if (pair.more.len == 0 and !(names.appending and contains(rest, pair.name, names.ignoring_case))) {
                try out.write(pair.value);
                continue;
            }
            try out.beginArray();
            try writeValues(pair, out);
            if (names.appending) {
                for (rest) |other| {
                    if (sameName(other.name, pair.name, names.ignoring_case)) try writeValues(other, out);
                }
            }
            try out.endArray();
        }
        try out.endObject();
    }

    fn writeValues(pair: Header, out: anytype) !void {
        try out.write(pair.value);
        for (pair.more) |value| try out.write(value);
    }
};

/// Exports a function for each hook named in `hooks`, and the memory functions that the agent
/// needs.
///
/// A hook is `fn (Allocator, Event) !Decision`. `on_configure` is
/// `fn (Allocator, []const u8) !void`: it takes JSON, and an error rejects the configuration.
pub fn exportHooks(comptime hooks: anytype) void {
    @export(&alloc, .{ .name = "alloc" });
    @export(&dealloc, .{ .name = "dealloc" });
    for (@typeInfo(@TypeOf(hooks)).@"struct".field_names) |name| {
        const Hook = struct {
            fn call(pointer: [*]const u8, len: usize) callconv(.c) u64 {
                const event = pointer[0..len];
                const function = @field(hooks, name);
                if (comptime std.mem.eql(u8, name, "on_configure")) return configure(function, event);
                return decide(EventOf(name), function, event);
            }
        };
        @export(&Hook.call, .{ .name = name });
    }
}

fn EventOf(comptime hook: []const u8) type {
    const events = .{
        .on_request_headers = Request,
        .on_request_body = Request,
        .on_response_headers = Response,
        .on_response_body = Response,
        .on_websocket_frame = WebsocketFrame,
        .on_guardrail_inspect = Guardrail,
        .on_request_complete = Completion,
    };
    if (!@hasField(@TypeOf(events), hook)) @compileError("unknown hook `" ++ hook ++ "`");
    return @field(events, hook);
}

const gpa = std.heap.wasm_allocator;

/// Arena memory to keep between calls, so most calls allocate nothing.
const retained_bytes = 256 * 1024;
var call_arena: std.heap.ArenaAllocator = .init(gpa);

fn alloc(size: usize) callconv(.c) ?[*]u8 {
    const memory = gpa.alloc(u8, @max(size, 1)) catch return null;
    return memory.ptr;
}

fn dealloc(pointer: ?[*]u8, size: usize) callconv(.c) void {
    if (pointer) |memory| gpa.free(memory[0..@max(size, 1)]);
}

fn decide(comptime Event: type, comptime function: anytype, event: []const u8) u64 {
    defer _ = call_arena.reset(.{ .retain_with_limit = retained_bytes });
    const arena = call_arena.allocator();
    const decision = run(Event, function, arena, event) catch |err| @panic(@errorName(err));
    return answer(decision);
}

fn run(comptime Event: type, comptime function: anytype, arena: Allocator, event: []const u8) anyerror!Decision {
    const parsed = try json.parseFromSliceLeaky(Event, arena, event, .{
        .ignore_unknown_fields = true,
        .duplicate_field_behavior = .use_last,
    });
    return function(arena, parsed);
}

fn configure(comptime function: anytype, config: []const u8) u64 {
    defer _ = call_arena.reset(.{ .retain_with_limit = retained_bytes });
    const result: anyerror!void = function(call_arena.allocator(), config);
    result catch |err| return answer(.{ .@"error" = @errorName(err) });
    return 0;
}

/// Returns an answer to the agent: a pointer in the upper half, a length in the lower.
fn answer(value: anytype) u64 {
    var out: std.Io.Writer.Allocating = .init(gpa);
    json.Stringify.value(value, .{}, &out.writer) catch @panic("out of memory");
    const text = out.toOwnedSlice() catch @panic("out of memory");
    return @as(u64, @intFromPtr(text.ptr)) << 32 | text.len;
}

fn decode(arena: Allocator, body: []const u8, encoding: Encoding) ![]const u8 {
    if (encoding == .@"utf-8") return body;
    const decoder = std.base64.standard.Decoder;
    const decoded = try arena.alloc(u8, try decoder.calcSizeForSlice(body));
    try decoder.decode(decoded, body);
    return decoded;
}

extern "zentinel" fn log(level: i32, message: [*]const u8, len: usize) void;

/// Writes a line to the agent's log. `std.log` does so too if the root file sets `logFn`.
pub fn writeLog(level: std.log.Level, message: []const u8) void {
    log(switch (level) {
        .debug => 1,
        .info => 2,
        .warn => 3,
        .err => 4,
    }, message.ptr, message.len);
}

/// For `std_options`: routes `std.log` to the agent's log.
pub fn logFn(
    comptime level: std.log.Level,
    comptime scope: @EnumLiteral(),
    comptime format: []const u8,
    args: anytype,
) void {
    const prefix = if (scope == .default) "" else @tagName(scope) ++ ": ";
    // Longer lines are truncated.
    var buffer: [1024]u8 = undefined;
    var line: std.Io.Writer = .fixed(&buffer);
    line.print(prefix ++ format, args) catch {};
    writeLog(level, line.buffered());
}

/// For the root file: writes panic messages to the agent's log.
pub const panic = std.debug.FullPanic(reportPanic);

fn reportPanic(message: []const u8, first_trace_address: ?usize) noreturn {
    _ = first_trace_address;
    writeLog(.err, message);
    @trap();
}
