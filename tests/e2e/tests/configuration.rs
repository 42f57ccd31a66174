//! The `config { }` block of the proxy's configuration.

use zentinel_wasm_e2e::{Ask, Stack, on_both_transports, wait};

/// A request whose module call fails.
fn failing() -> Ask {
    Ask::get("/").query("on_request_headers", "!trap")
}

on_both_transports! {
    fn an_accepted_configuration_is_in_force(transport) {
        let stack = Stack::over(transport).agent_lines("config { fail-open #true; pool-size 2; }").start();
        assert_eq!(stack.send(&failing()).status(), 200);
    }

    fn module_settings_reach_the_guest(transport) {
        let stack = Stack::over(transport).agent_lines(r#"config { module-config { greeting "hello"; limit 7; } }"#).start();
        let answer = r#"{"decision":"block","status":418,"body":"$config"}"#;
        let response = stack.send(&Ask::get("/").query("on_request_headers", answer));
        assert_eq!(response.status(), 418);
        assert_eq!(response.json(), serde_json::json!({"greeting": "hello", "limit": 7}));
    }

    fn an_unknown_key_is_rejected_and_the_proxy_logs_the_reason(transport) {
        let mut stack = Stack::over(transport).agent_lines("config { fail-opne #true; }").start_unready();
        wait::until("the proxy logs the reason", || stack.proxy().log().contains("fail-opne").then_some(()));
        assert!(stack.send(&Ask::get("/")).status() >= 500, "a closed proxy lets nothing through");
    }

    fn what_the_guest_rejects_is_rejected_with_its_reason(transport) {
        let lines = r#"config { module-config { answer { on_configure { error "no such list: moon"; } } } }"#;
        let mut stack = Stack::over(transport).agent_lines(lines).start_unready();
        wait::until("the proxy logs the reason", || stack.proxy().log().contains("no such list: moon").then_some(()));
        assert!(stack.send(&Ask::get("/")).status() >= 500, "a closed proxy lets nothing through");
    }

    fn a_proxy_reload_changes_it(transport) {
        let mut stack = Stack::over(transport).agent_lines("config { fail-open #false; }").start();
        assert_eq!(stack.send(&failing()).status(), 500);
        stack.reload_proxy("config { fail-open #true; }");
        wait::until("the new configuration is in force", || (stack.send(&failing()).status() == 200).then_some(()));
    }
}
