//! Pairs of concurrent requests, of which one is blocked and one allowed. If a client gives both
//! the same correlation id, the proxy may apply the older one's answer to the newer one. Requests
//! with distinct ids are not affected, and an operator can enforce distinct ids.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use zentinel_wasm_e2e::http::read_message;
use zentinel_wasm_e2e::{Stack, Transport, on_both_transports};

/// Enough to show the problem: without a remedy, one pair in 30 fails on the Unix socket.
const PAIRS: usize = 1000;

/// Concurrent clients, each with one pair at a time.
const CLIENTS: usize = 8;

/// The mirror guest's answer, percent-encoded: `{"decision":"block"}`.
const BLOCK: &str = "on_request_headers=%7B%22decision%22:%22block%22%7D";

/// How many pairs had which statuses: that of the allowed request and that of the blocked one.
type Outcomes = BTreeMap<(u16, u16), usize>;

/// The outcomes if every request gets its own answer.
fn all_correct() -> Outcomes {
    BTreeMap::from([((200, 403), PAIRS)])
}

fn start(transport: Transport, agent_lines: &str) -> Stack {
    Stack::over(transport).events(&["request_headers"]).agent_lines(agent_lines).start()
}

/// Header lines that give both requests of a pair the same id.
fn shared(pair: usize) -> String {
    // Alternates between all headers from which the proxy takes an id.
    let name = ["X-Correlation-Id", "X-Trace-Id", "X-Request-Id"][pair % 3];
    format!("{name}: twin-{pair}\r\n")
}

/// Sends the pairs to the proxy on `port`. `headers` returns the header lines for a pair's number
/// and for the name of one of its two requests.
fn send_pairs(port: u16, headers: impl Fn(usize, &str) -> String + Sync) -> Outcomes {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Outcomes::new());
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let pair = next.fetch_add(1, Relaxed);
                    if pair >= PAIRS {
                        break;
                    }
                    let outcome = send_pair(port, pair, &headers).expect("the proxy did not respond");
                    *outcomes.lock().unwrap().entry(outcome).or_default() += 1;
                }
            });
        }
    });
    outcomes.into_inner().unwrap()
}

fn send_pair(port: u16, pair: usize, headers: impl Fn(usize, &str) -> String) -> io::Result<(u16, u16)> {
    let head = |which: &str, query: &str| {
        format!("GET /{pair}?{query} HTTP/1.1\r\nHost: shop.example\r\n{}Connection: close\r\n\r\n", headers(pair, which))
    };
    let allowed = (TcpStream::connect(("127.0.0.1", port))?, head("allowed", ""));
    let blocked = (TcpStream::connect(("127.0.0.1", port))?, head("blocked", BLOCK));
    // Both connect before either sends, and they alternate in sending first.
    let order = if pair.is_multiple_of(2) { [&allowed, &blocked] } else { [&blocked, &allowed] };
    for (mut socket, head) in order.map(|(socket, head)| (socket, head)) {
        socket.write_all(head.as_bytes())?;
    }
    Ok((status(allowed.0)?, status(blocked.0)?))
}

fn status(socket: TcpStream) -> io::Result<u16> {
    let response = read_message(&mut BufReader::new(socket), |_| true)?;
    response.map(|response| response.status()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

on_both_transports! {
    requests_with_distinct_ids_get_their_own_answers
    twins_get_their_own_answers_behind_a_hop_that_removes_their_ids
    twins_get_their_own_answers_with_one_call_at_a_time
}

fn requests_with_distinct_ids_get_their_own_answers(transport: Transport) {
    let stack = start(transport, "");
    assert_eq!(send_pairs(stack.proxy_port(), |_, _| String::new()), all_correct());
    let own = |pair: usize, which: &str| format!("X-Correlation-Id: {pair}-{which}\r\n");
    assert_eq!(send_pairs(stack.proxy_port(), own), all_correct());
}

fn twins_get_their_own_answers_behind_a_hop_that_removes_their_ids(transport: Transport) {
    let stack = start(transport, "");
    let hop = stack.start_hop(r#"policies { request-headers { remove "X-Trace-Id" "X-Correlation-Id" "X-Request-Id"; } }"#);
    assert_eq!(send_pairs(hop.port(), |pair, _| shared(pair)), all_correct());
}

fn twins_get_their_own_answers_with_one_call_at_a_time(transport: Transport) {
    let stack = start(transport, "max-concurrent-calls 1");
    assert_eq!(send_pairs(stack.proxy_port(), |pair, _| shared(pair)), all_correct());
}
