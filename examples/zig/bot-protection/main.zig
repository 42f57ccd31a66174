//! Challenges clients that look like bots.

const std = @import("std");
const zentinel = @import("zentinel");

pub const panic = zentinel.panic;
pub const std_options: std.Options = .{ .logFn = zentinel.logFn };

comptime {
    zentinel.exportHooks(.{ .on_request_headers = check });
}

fn check(arena: std.mem.Allocator, request: zentinel.Request) !zentinel.Decision {
    _ = arena;
    const user_agent = request.headers.get("User-Agent") orelse "";
    if (user_agent.len == 0) {
        return .{ .decision = .challenge, .challenge_type = "js_challenge", .tags = &.{"no-user-agent"} };
    }
    if (contains(user_agent, "bot") or contains(user_agent, "curl")) {
        return .{
            .decision = .challenge,
            .challenge_type = "captcha",
            .challenge_params = &.{.{ .name = "site_key", .value = "your-captcha-site-key" }},
            .tags = &.{"suspicious-ua"},
        };
    }
    return .{};
}

fn contains(text: []const u8, part: []const u8) bool {
    return std.ascii.findIgnoreCase(text, part) != null;
}
