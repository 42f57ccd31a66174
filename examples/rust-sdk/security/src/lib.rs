//! Blocks all requests to `/admin`.

use zentinel_wasm_sdk::{Decision, Request};

fn check(request: &Request<'_>) -> Decision {
    if request.uri().contains("/admin") {
        return Decision::block(403).body("Forbidden");
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

    #[test]
    fn blocks_admin_paths() {
        let event = Event::request("GET", "/a/admin?x=1");
        assert_eq!(check(&event.to_request()), Decision::block(403).body("Forbidden"));
    }

    #[test]
    fn allows_other_paths() {
        assert_eq!(check(&Event::request("GET", "/Admin").to_request()), Decision::allow());
        assert_eq!(check(&Event::request("GET", "/").to_request()), Decision::allow());
    }
}
