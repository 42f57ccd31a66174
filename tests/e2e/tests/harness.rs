//! The harness itself, without a proxy, because every other test relies on it.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use zentinel_wasm_e2e::HttpRequest;
use zentinel_wasm_e2e::upstream::{Upstream, pattern};
use zentinel_wasm_e2e::websocket::WebSocket;

#[test]
fn the_upstream_describes_the_request() {
    let upstream = Upstream::start().unwrap();
    let request = HttpRequest::post("/a", "größe".as_bytes()).query("q", "ä&b").header("X-Twice", "1").header("X-Twice", "2");
    let response = request.send(upstream.port()).unwrap();
    assert_eq!((response.status(), response.complete), (200, true));
    let received = response.json();
    assert_eq!((&received["method"], &received["path"]), (&"POST".into(), &"/a?q=%C3%A4%26b".into()));
    assert_eq!((&received["body"], &received["body_bytes"]), (&"größe".into(), &7.into()));
    assert!(received["headers"].to_string().contains(r#"["X-Twice","1"],["X-Twice","2"]"#));
    assert_eq!(upstream.requests(), 1);
}

#[test]
fn bodies_are_echoed_unchanged_in_both_framings() {
    let upstream = Upstream::start().unwrap();
    let sent = pattern(100_000);
    for framing in ["length", "chunked"] {
        let response = HttpRequest::post("/", &sent).query("echo", "1").query(framing, "1").send(upstream.port()).unwrap();
        assert!(response.complete && response.body == sent, "{framing}");
    }
    let response = HttpRequest::post("/", &sent).chunked().query("echo", "1").send(upstream.port()).unwrap();
    assert!(response.complete && response.body == sent);
    let response = HttpRequest::get("/").query("bytes", "100000").query("status", "404").send(upstream.port()).unwrap();
    assert_eq!((response.status(), response.body == sent), (404, true));
}

#[test]
fn a_truncated_body_is_incomplete() {
    for cut_off in ["Content-Length: 10\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // The request fits in one read. Closing with unread data would reset the connection.
            let read = stream.read(&mut [0; 4096]).unwrap();
            assert!(read > 0);
            write!(stream, "HTTP/1.1 200 OK\r\n{cut_off}").unwrap();
        });
        let response = HttpRequest::get("/").send(port).unwrap();
        assert_eq!((response.text().as_str(), response.complete), ("half", false));
    }
}

#[test]
fn websocket_messages_are_echoed() {
    let upstream = Upstream::start().unwrap();
    let mut socket = WebSocket::connect(upstream.port(), "/").unwrap();
    for message in ["hello", &"long ".repeat(100)] {
        socket.send(message).unwrap();
        assert_eq!(socket.receive().unwrap().as_deref(), Some(message));
    }
}
