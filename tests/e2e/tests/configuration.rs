//! The `config { }` block of the proxy's configuration.

use zentinel_wasm_e2e::http::exchange;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, free_port, on_both_transports, wait};

/// A request whose module call traps.
fn failing() -> HttpRequest {
    HttpRequest::get("/").query("on_request_headers", "!trap")
}

on_both_transports! {
    a_valid_configuration_is_applied
    module_settings_reach_the_module
    a_proxy_reload_replaces_the_configuration
    an_unknown_key_is_rejected_with_a_reason
    the_module_can_reject_with_a_reason
    a_rejection_shows_in_health_until_it_is_corrected
}

fn a_valid_configuration_is_applied(transport: Transport) {
    let stack = Stack::over(transport).agent_lines("config { fail-open #true; pool-size 2; }").start();
    assert_eq!(stack.send(&failing()).status(), 200);
}

fn module_settings_reach_the_module(transport: Transport) {
    let stack = Stack::over(transport).agent_lines(r#"config { module-config { greeting "hello"; limit 7; } }"#).start();
    let answer = r#"{"decision":"block","status":418,"body":"$config"}"#;
    let response = stack.send(&HttpRequest::get("/").query("on_request_headers", answer));
    assert_eq!(response.status(), 418);
    assert_eq!(response.json(), serde_json::json!({"greeting": "hello", "limit": 7}));
}

fn a_proxy_reload_replaces_the_configuration(transport: Transport) {
    let mut stack = Stack::over(transport).agent_lines("config { fail-open #false; }").start();
    assert_eq!(stack.send(&failing()).status(), 500);
    stack.reload_proxy("config { fail-open #true; }");
    wait::until("the new configuration is applied", || (stack.send(&failing()).status() == 200).then_some(()));
}

fn an_unknown_key_is_rejected_with_a_reason(transport: Transport) {
    let mut stack = Stack::over(transport).agent_lines("config { fail-opne #true; }").start_unready();
    wait::until("the proxy logs the reason", || stack.proxy().log().contains("fail-opne").then_some(()));
    assert!(stack.send(&HttpRequest::get("/")).status() >= 500, "the proxy allowed a request");
}

fn the_module_can_reject_with_a_reason(transport: Transport) {
    let lines = r#"config { module-config { answer { on_configure { error "no such list: moon"; } } } }"#;
    let mut stack = Stack::over(transport).agent_lines(lines).start_unready();
    wait::until("the proxy logs the reason", || stack.proxy().log().contains("no such list: moon").then_some(()));
    assert!(stack.send(&HttpRequest::get("/")).status() >= 500, "the proxy allowed a request");
}

fn a_rejection_shows_in_health_until_it_is_corrected(transport: Transport) {
    let admin = free_port();
    let address = format!("127.0.0.1:{admin}");
    let admin_args = ["--admin-address", &address];
    let mut stack = Stack::over(transport).agent_lines("config { fail-opne #true; }").agent_args(&admin_args).start_unready();
    let get = |path: &str| exchange(admin, "GET", path, &[("Host".into(), "localhost".into())], None).expect("no response").text();
    let health = wait::until("health has the rejection", || Some(get("/healthz")).filter(|health| health != "healthy\n"));
    assert!(health.starts_with("degraded: rejected the proxy's configuration: unknown key `fail-opne`"), "{health}");
    wait::until("the proxy has tried every connection", || (stack.proxy().log().matches("fail-opne").count() >= 4).then_some(()));
    let metrics = get("/metrics");
    for line in ["wasm_agent_proxy_config_rejected 1", r#"wasm_agent_reloads_total{result="failure"} 1"#] {
        assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
    }
    assert_eq!(stack.agent().log().matches("rejected the proxy's configuration").count(), 1, "{}", stack.agent().log());
    stack.reload_proxy("config { fail-open #true; }");
    wait::until("the corrected configuration is accepted", || (get("/healthz") == "healthy\n").then_some(()));
    stack.wait_until_ready();
}
