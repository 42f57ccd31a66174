//! Uses most of what a policy can read and answer. Its decisions serve no purpose.

use serde::Deserialize;
use zentinel_wasm_sdk::{
    Completion, Decision, Detection, Direction, Guardrail, Inspection, Opcode, Request, RequestBody, Response, ResponseBody, WebsocketFrame,
};

#[derive(Deserialize)]
struct Config {
    greeting: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { greeting: "none".to_owned() }
    }
}

fn on_request(request: &Request<'_>, config: &Config) -> Decision {
    log::info!("a request; the greeting is {}", config.greeting);
    Decision::allow()
        .set_request_header("X-Seen", format!("{} {}", request.method(), request.uri()))
        .append_request_header("Cookie", "tour=1")
        .remove_request_header("X-Debug")
        .set_response_header("X-Frame-Options", "DENY")
        .remove_response_header("Server")
        .tag("tour")
        .rule_id("T-1")
        .reason_code("SEEN")
        .confidence(0.5)
        .routing("upstream", "blue")
        .needs_more()
}

fn on_request_body(body: &RequestBody<'_>, _: &Config) -> Result<Decision, &'static str> {
    let mut bytes = body.bytes().ok_or("the body is invalid base64")?.into_owned();
    bytes.push(0xff);
    Ok(Decision::allow().replace_request_body_bytes(bytes))
}

fn on_response(response: &Response<'_>, _: &Config) -> Decision {
    if response.status() >= 500 {
        return Decision::redirect("/sorry").status(303);
    }
    let cookies = response.headers().values("set-cookie").map(|cookie| cookie.into_owned());
    Decision::allow()
        .set_response_header_values("Set-Cookie", cookies.chain(["tour=1".to_owned()]))
        .append_response_header("Vary", "Cookie")
        .append_response_header("Vary", "Accept")
}

fn on_response_body(body: &ResponseBody<'_>, _: &Config) -> Result<Decision, &'static str> {
    if body.text() == Some("") {
        return Ok(Decision::allow().drop_response_body());
    }
    if let Some(text) = body.text() {
        return Ok(Decision::allow().replace_response_body(format!("{text}!")));
    }
    let mut bytes = body.bytes().ok_or("the body is invalid base64")?.into_owned();
    bytes.push(b'!');
    Ok(Decision::allow().replace_response_body_bytes(bytes))
}

fn on_frame(frame: &WebsocketFrame<'_>, _: &Config) -> Decision {
    if frame.opcode() == Some(Opcode::Ping) {
        return Decision::allow().drop_frame();
    }
    if frame.direction() == Direction::ToServer && frame.text() == Some("bye") {
        return Decision::allow().close_websocket(1008, "bye");
    }
    Decision::allow()
}

fn on_guardrail(guardrail: &Guardrail<'_>, _: &Config) -> Inspection {
    match guardrail.content().find('@') {
        Some(at) => Inspection::clean().detection(Detection::new("email", "an address").span(at..at + 1)),
        None => Inspection::clean(),
    }
}

fn on_complete(completion: &Completion<'_>, _: &Config) {
    log::debug!("status {}", completion.status());
}

zentinel_wasm_sdk::export! {
    config: Config,
    on_request_headers: on_request,
    on_request_body: on_request_body,
    on_response_headers: on_response,
    on_response_body: on_response_body,
    on_websocket_frame: on_frame,
    on_guardrail_inspect: on_guardrail,
    on_request_complete: on_complete,
}
