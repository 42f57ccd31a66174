//! Blocks all requests to `/admin`.

const std = @import("std");
const zentinel = @import("zentinel");

pub const panic = zentinel.panic;
pub const std_options: std.Options = .{ .logFn = zentinel.logFn };

comptime {
    zentinel.exportHooks(.{ .on_request_headers = check });
}

fn check(arena: std.mem.Allocator, request: zentinel.Request) !zentinel.Decision {
    _ = arena;
    if (std.mem.find(u8, request.uri, "/admin") != null) {
        return .{ .decision = .block, .status = 403, .body = "Forbidden" };
    }
    return .{};
}
