//! The product page's two modules behind the real proxy, with the user agents of real clients.

use zentinel_wasm_e2e::http::Message;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports};

const BROWSERS: [&str; 3] = [
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 Mobile/15E148 Safari/604.1",
];

const TOOLS_AND_BOTS: [&str; 3] = [
    "curl/8.14.1",
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)",
];

fn visit(stack: &Stack, path: &str, user_agent: &str) -> Message {
    stack.send(&HttpRequest::get(path).header("User-Agent", user_agent))
}

on_both_transports! {
    the_security_module_blocks_admin
    the_bot_protection_module_challenges_all_but_browsers
}

fn the_security_module_blocks_admin(transport: Transport) {
    let stack = Stack::over(transport).module(|paths| &paths.security).start();
    for user_agent in BROWSERS.iter().chain(&TOOLS_AND_BOTS) {
        let admin = visit(&stack, "/admin/users?id=7", user_agent);
        assert_eq!((admin.status(), admin.text().as_str()), (403, "Forbidden"), "{user_agent}");
        let home = visit(&stack, "/api/users?page=1", user_agent);
        assert_eq!(home.status(), 200, "{user_agent}");
        assert_eq!(home.json()["path"], "/api/users?page=1");
    }
}

fn the_bot_protection_module_challenges_all_but_browsers(transport: Transport) {
    let stack = Stack::over(transport).module(|paths| &paths.bot_protection).start();
    for user_agent in BROWSERS {
        assert_eq!(visit(&stack, "/", user_agent).status(), 200, "{user_agent}");
    }
    let before = stack.upstream_requests();
    for user_agent in TOOLS_AND_BOTS {
        assert_eq!(visit(&stack, "/", user_agent).status(), 403, "{user_agent}");
    }
    assert_eq!(stack.send(&HttpRequest::get("/")).status(), 403, "no user agent");
    assert_eq!(stack.upstream_requests(), before);
}
