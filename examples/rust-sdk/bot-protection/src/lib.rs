//! Challenges clients that look like bots.

use zentinel_wasm_sdk::{Decision, Request};

fn check(request: &Request<'_>) -> Decision {
    let user_agent = request.header("User-Agent").unwrap_or_default().to_ascii_lowercase();
    if user_agent.is_empty() {
        return Decision::challenge("js_challenge").tag("no-user-agent");
    }
    if user_agent.contains("bot") || user_agent.contains("curl") {
        return Decision::challenge("captcha").param("site_key", "your-captcha-site-key").tag("suspicious-ua");
    }
    Decision::allow()
}

zentinel_wasm_sdk::export! {
    on_request_headers: check,
}

#[cfg(test)]
mod tests {
    use super::*;
    use zentinel_wasm_sdk::testing::Event;

    fn decide(user_agent: &str) -> Decision {
        check(&Event::request("GET", "/").header("user-agent", user_agent).to_request())
    }

    #[test]
    fn challenges_a_missing_user_agent_with_a_script() {
        let expected = Decision::challenge("js_challenge").tag("no-user-agent");
        assert_eq!(check(&Event::request("GET", "/").to_request()), expected);
        assert_eq!(decide(""), expected);
    }

    #[test]
    fn challenges_bots_with_a_captcha() {
        let expected = Decision::challenge("captcha").param("site_key", "your-captcha-site-key").tag("suspicious-ua");
        assert_eq!(decide("GoogleBot/2.1"), expected);
        assert_eq!(decide("curl/8.5.0"), expected);
    }

    #[test]
    fn allows_browsers() {
        assert_eq!(decide("Mozilla/5.0 (X11; Linux x86_64)"), Decision::allow());
    }
}
