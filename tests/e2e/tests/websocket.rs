//! Frames of an upgraded connection, which the proxy sends to the agent over the socket only.

use std::io;
use zentinel_wasm_e2e::websocket::WebSocket;
use zentinel_wasm_e2e::{Stack, Transport};

/// A message for which the mirror module gives this answer.
fn message(answer: &str) -> String {
    format!(r#"{{"answer":{{"on_websocket_frame":{answer}}}}}"#)
}

fn connect(stack: &Stack) -> io::Result<WebSocket> {
    WebSocket::connect(stack.proxy_port(), "/chat")
}

/// Whether the connection has ended. The proxy sends an error page instead of a close frame, so
/// anything that is not a message counts as the end.
fn is_over(socket: &mut WebSocket) -> bool {
    !matches!(socket.receive(), Ok(Some(_)))
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn frames_are_allowed_dropped_or_close_the_connection() -> io::Result<()> {
    let stack = Stack::over(Transport::UnixSocket)
        .events(&["request_headers", "websocket_frame"])
        .route_lines("websocket #true; websocket-inspection #true")
        .start();

    let mut socket = connect(&stack)?;
    socket.send("hello")?;
    assert_eq!(socket.receive()?.as_deref(), Some("hello"));

    socket.send(&message(r#"{"websocket_decision":"drop"}"#))?;
    socket.send("after the dropped one")?;
    assert_eq!(socket.receive()?.as_deref(), Some("after the dropped one"));

    socket.send(&message(r#"{"websocket_decision":{"close":{"code":1008,"reason":"no"}}}"#))?;
    assert!(is_over(&mut socket));

    let mut socket = connect(&stack)?;
    socket.send(&message(r#"{"decision":"block"}"#))?;
    assert!(is_over(&mut socket), "a block closes the connection too");
    Ok(())
}
