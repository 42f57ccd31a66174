//! Uses most of what a policy can read and answer. Its decisions serve no purpose.

const std = @import("std");
const zentinel = @import("zentinel");
const Allocator = std.mem.Allocator;

pub const panic = zentinel.panic;
pub const std_options: std.Options = .{ .logFn = zentinel.logFn };

comptime {
    zentinel.exportHooks(.{
        .on_configure = configure,
        .on_request_headers = onRequest,
        .on_request_body = onRequestBody,
        .on_response_headers = onResponse,
        .on_response_body = onResponseBody,
        .on_websocket_frame = onFrame,
        .on_guardrail_inspect = onGuardrail,
        .on_request_complete = onComplete,
    });
}

fn configure(arena: Allocator, config: []const u8) !void {
    _ = try std.json.parseFromSliceLeaky(struct { greeting: []const u8 }, arena, config, .{});
}

fn onRequest(arena: Allocator, request: zentinel.Request) !zentinel.Decision {
    std.log.info("a request of {d} headers", .{request.headers.items.len});
    const seen = try std.fmt.allocPrint(arena, "{s} {s}", .{ request.method, request.uri });
    const set = try arena.dupe(zentinel.Header, &.{.{ .name = "X-Seen", .value = seen }});
    return .{
        .add_request_headers = set,
        .append_request_headers = &.{.{ .name = "Cookie", .value = "tour=1" }},
        .remove_request_headers = &.{"X-Debug"},
        .add_response_headers = &.{.{ .name = "X-Frame-Options", .value = "DENY" }},
        .remove_response_headers = &.{"Server"},
        .tags = &.{"tour"},
        .rule_ids = &.{"T-1"},
        .reason_codes = &.{"SEEN"},
        .confidence = 0.5,
        .routing_metadata = &.{.{ .name = "upstream", .value = "blue" }},
        .needs_more = true,
    };
}

fn onRequestBody(arena: Allocator, request: zentinel.Request) !zentinel.Decision {
    const longer = try std.mem.concat(arena, u8, &.{ try request.bytes(arena), "\xff" });
    return .{ .request_body_mutation = .{ .replace_bytes = longer } };
}

fn onResponse(arena: Allocator, response: zentinel.Response) !zentinel.Decision {
    if (response.status >= 500) return .{ .decision = .redirect, .status = 303, .body = "/sorry" };
    const none: []const []const u8 = &.{"none=1"};
    const cookies = response.header_values.map.get("Set-Cookie") orelse none;
    const more = try std.mem.concat(arena, []const u8, &.{ cookies[1..], &.{"tour=1"} });
    const set = try arena.dupe(zentinel.Header, &.{.{ .name = "Set-Cookie", .value = cookies[0], .more = more }});
    return .{
        .add_response_headers = set,
        .append_response_headers = &.{ .{ .name = "Vary", .value = "Cookie" }, .{ .name = "Vary", .value = "Accept" } },
    };
}

fn onResponseBody(arena: Allocator, response: zentinel.Response) !zentinel.Decision {
    if (response.body.len == 0) return .{ .response_body_mutation = .drop };
    const longer = try std.mem.concat(arena, u8, &.{ try response.bytes(arena), "!" });
    if (response.body_encoding == .base64) return .{ .response_body_mutation = .{ .replace_bytes = longer } };
    return .{ .response_body_mutation = .{ .replace = longer } };
}

fn onFrame(arena: Allocator, frame: zentinel.WebsocketFrame) !zentinel.Decision {
    if (std.mem.eql(u8, frame.opcode, "ping")) return .{ .websocket_decision = .drop };
    if (frame.client_to_server and std.mem.eql(u8, try frame.bytes(arena), "bye")) {
        return .{ .websocket_decision = .{ .close = .{ .code = 1008, .reason = "bye" } } };
    }
    return .{};
}

fn onGuardrail(arena: Allocator, guardrail: zentinel.Guardrail) !zentinel.Decision {
    _ = arena;
    if (guardrail.content.len == 0) return error.NothingToInspect;
    return .{};
}

fn onComplete(arena: Allocator, completion: zentinel.Completion) !zentinel.Decision {
    _ = arena;
    std.log.debug("status {d}", .{completion.status});
    return .{};
}
