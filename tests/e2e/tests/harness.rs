//! The harness itself, without a proxy: what it cannot see, no other test can.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use zentinel_wasm_e2e::Ask;
use zentinel_wasm_e2e::upstream::{Upstream, pattern};
use zentinel_wasm_e2e::websocket::WebSocket;

#[test]
fn the_upstream_tells_what_it_was_sent() {
    let upstream = Upstream::start().unwrap();
    let ask = Ask::post("/a", "größe".as_bytes()).query("q", "ä&b").header("X-Twice", "1").header("X-Twice", "2");
    let response = ask.send(upstream.port()).unwrap();
    assert_eq!((response.status(), response.complete), (200, true));
    let told = response.json();
    assert_eq!((&told["method"], &told["path"]), (&"POST".into(), &"/a?q=%C3%A4%26b".into()));
    assert_eq!((&told["body"], &told["body_bytes"]), (&"größe".into(), &7.into()));
    assert!(told["headers"].to_string().contains(r#"["X-Twice","1"],["X-Twice","2"]"#));
    assert_eq!(upstream.requests(), 1);
}

#[test]
fn bodies_come_back_byte_for_byte_in_either_framing() {
    let upstream = Upstream::start().unwrap();
    let sent = pattern(100_000);
    for framing in ["length", "chunked"] {
        let response = Ask::post("/", &sent).query("echo", "1").query(framing, "1").send(upstream.port()).unwrap();
        assert!(response.complete && response.body == sent, "{framing}");
    }
    let response = Ask::post("/", &sent).chunked().query("echo", "1").send(upstream.port()).unwrap();
    assert!(response.complete && response.body == sent);
    let response = Ask::get("/").query("bytes", "100000").query("status", "404").send(upstream.port()).unwrap();
    assert_eq!((response.status(), response.body == sent), (404, true));
}

#[test]
fn a_body_that_was_cut_off_is_told_from_one_that_was_not() {
    for cut_off in ["Content-Length: 10\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // The request fits in one read; were it left unread, closing would reset the connection.
            let read = stream.read(&mut [0; 4096]).unwrap();
            assert!(read > 0);
            write!(stream, "HTTP/1.1 200 OK\r\n{cut_off}").unwrap();
        });
        let response = Ask::get("/").send(port).unwrap();
        assert_eq!((response.text().as_str(), response.complete), ("half", false));
    }
}

#[test]
fn a_websocket_message_comes_back() {
    let upstream = Upstream::start().unwrap();
    let mut socket = WebSocket::connect(upstream.port(), "/").unwrap();
    for message in ["hello", &"long ".repeat(100)] {
        socket.send(message).unwrap();
        assert_eq!(socket.receive().unwrap().as_deref(), Some(message));
    }
}
