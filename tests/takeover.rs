//! Restarts and upgrades that the proxy's connections survive.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{
    Agent, Connection, Program, ServiceManager, Stop, base64, decision, frame, id_of, kind, module, module_error, request, response,
    wait_for,
};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// A deadline that calls meet on a busy machine.
const AMPLE: [&str; 2] = ["--timeout-ms", "20000"];

/// Connections of the load: as many as a proxy opens.
const CONNECTIONS: usize = 4;

/// Events in flight on each connection of the load.
const IN_FLIGHT: usize = 8;

/// The folder of a socket that several processes serve in turn.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("wasm.sock")
    }

    fn control(&self) -> PathBuf {
        self.0.path().join("wasm.sock.takeover")
    }

    /// Writes a module.
    #[track_caller]
    fn module(&self, name: &str, wat: &str) -> PathBuf {
        module::write(self.0.path(), name, wat)
    }

    /// Starts a process that may take over, without waiting.
    fn launch(&self, module: &Path, options: &[&str]) -> Agent {
        AGENT.launch_in(tempfile::tempdir().unwrap(), self.socket(), module, |command| {
            command.arg("--takeover").args(AMPLE).args(options);
        })
    }

    /// Starts a process, and waits until it serves.
    #[track_caller]
    fn start(&self, module: &Path, options: &[&str]) -> Agent {
        let agent = self.launch(module, options);
        agent.log.wait_until_serving();
        agent
    }

    /// Lets another process take over, and waits until the first has ended.
    #[track_caller]
    fn replace(&self, mut agent: Agent, module: &Path, options: &[&str]) -> Agent {
        let next = self.start(module, options);
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log.whole());
        assert!(!agent.log.whole().contains("panicked"), "{}", agent.log.whole());
        next
    }
}

/// The tag of a [`module::tagging`].
#[track_caller]
fn tag(answer: &Value) -> &str {
    assert_eq!(module_error(answer), None, "{answer}");
    answer["audit"]["tags"][0].as_str().unwrap_or_else(|| panic!("no tag in {answer}"))
}

/// The frame of a request's headers.
fn event(id: &str) -> Vec<u8> {
    frame(kind::REQUEST_HEADERS, request(id, "/").to_string().as_bytes())
}

/// Keeps events in flight on a connection until `stop`, and checks that each is answered once.
/// Returns their number.
fn load(connection: &mut Connection, name: usize, stop: &AtomicBool) -> usize {
    let mut in_flight = HashMap::new();
    let mut number = 0;
    loop {
        while in_flight.len() < IN_FLIGHT && !stop.load(Relaxed) {
            let id = format!("{name}-{number}");
            // Blocked and allowed ones, so that an answer to another request is noticed.
            let uri = if number % 3 == 0 { "/blocked" } else { "/" };
            number += 1;
            connection.send(kind::REQUEST_HEADERS, &request(&id, uri));
            in_flight.insert(id, uri);
        }
        if in_flight.is_empty() {
            return number;
        }
        let answer = connection.answer();
        let uri = in_flight.remove(id_of(&answer)).unwrap_or_else(|| panic!("unexpected answer: {answer}"));
        assert_eq!(module_error(&answer), None, "{answer}");
        assert_eq!(decision(&answer), if uri == "/" { "allow" } else { "block" }, "{answer}");
    }
}

/// Runs `change` some times under load.
fn under_load(socket: &Path, mut change: impl FnMut()) {
    let mut connections: Vec<Connection> = (0..CONNECTIONS).map(|_| Connection::open(socket)).collect();
    let stop = AtomicBool::new(false);
    let running = &stop;
    thread::scope(|scope| {
        let loads: Vec<_> =
            connections.iter_mut().enumerate().map(|(name, connection)| scope.spawn(move || load(connection, name, running))).collect();
        {
            let _stop = Stop(&stop);
            change();
        }
        let events: usize = loads.into_iter().map(|load| load.join().unwrap()).sum();
        assert!(events > CONNECTIONS * IN_FLIGHT, "{events} events");
    });
}

mod another_process {
    use super::*;

    #[test]
    fn gets_connections_with_half_a_frame() {
        let place = Place::new();
        let [old, new] = ["old", "new"].map(|tag| place.module(tag, &module::tagging(tag)));
        let agent = place.start(&old, &[]);
        let mut idle = agent.connect();
        let mut connection = agent.connect();
        assert_eq!(tag(&connection.get("a", "/")), "old");
        let event = event("b");
        connection.send_raw(&event[..event.len() / 2]);
        let agent = place.replace(agent, &new, &[]);
        connection.send_raw(&event[event.len() / 2..]);
        let answer = connection.answer();
        assert_eq!((id_of(&answer), tag(&answer)), ("b", "new"));
        assert_eq!(tag(&idle.get("c", "/")), "new");
        assert_eq!(tag(&agent.connect().get("d", "/")), "new", "the socket is served");
        agent.end_unharmed();
        assert!(!place.socket().exists() && !place.control().exists(), "its files are removed at the end");
    }

    #[test]
    fn gets_connections_before_their_handshake() {
        let place = Place::new();
        let module = place.module("m", &module::tagging("any"));
        let agent = place.start(&module, &[]);
        let mut connection = Connection::open_silent(&place.socket());
        let handshake = frame(kind::HANDSHAKE_REQUEST, br#"{"supported_versions":[2],"proxy_id":"p","proxy_version":"0.6.54"}"#);
        connection.send_raw(&handshake[..9]);
        let agent = place.replace(agent, &module, &[]);
        connection.send_raw(&handshake[9..]);
        assert_eq!(connection.receive().unwrap().0, kind::HANDSHAKE_RESPONSE);
        assert_eq!(tag(&connection.get("a", "/")), "any");
        agent.end_unharmed();
    }

    #[test]
    fn gets_connections_with_message_pack() {
        let place = Place::new();
        let module = place.module("m", &module::answering(&["on_response_headers"], r#"{"tags":["any"]}"#));
        let agent = place.start(&module, &[]);
        let mut connection = Connection::open_silent(&place.socket());
        let handshake = br#"{"supported_versions":[2],"proxy_id":"p","proxy_version":"0.6.54","supported_encodings":["msgpack"]}"#;
        connection.send_raw(&frame(kind::HANDSHAKE_REQUEST, handshake));
        assert_eq!(connection.receive().unwrap().1["encoding"], "msgpack");
        let agent = place.replace(agent, &module, &[]);
        // {"correlation_id": "a", "status": 200, "headers": {}}
        let event = [&b"\x83\xaecorrelation_id\xa1a"[..], b"\xa6status\xcc\xc8", b"\xa7headers\x80"].concat();
        connection.send_raw(&frame(kind::RESPONSE_HEADERS, &event));
        let answer = wait_for("the answer", || {
            let (kind, payload) = connection.receive_raw().expect("the agent closed the connection");
            (kind == kind::AGENT_RESPONSE).then_some(payload)
        });
        let has = |part: &[u8]| answer.windows(part.len()).any(|window| window == part);
        // A string of length 3 in an array of length 1.
        assert!(has(b"\xa4tags\x91\xa3any") && has(b"\xaecorrelation_id\xa1a"), "{}", String::from_utf8_lossy(&answer));
        agent.end_unharmed();
    }

    #[test]
    fn decides_with_the_proxy_s_configuration() {
        let place = Place::new();
        let module = place.module("m", &module::configurable());
        let agent = place.start(&module, &["--module-config", "1"]);
        let mut connection = agent.connect();
        connection.configure(&json!({"module-config": {"from": "the proxy"}})).unwrap();
        let agent = place.replace(agent, &module, &["--module-config", "2"]);
        assert_eq!(module::seen(&connection.get("a", "/")), json!({"from": "the proxy"}));
        agent.end_unharmed();
    }

    #[test]
    fn gets_what_is_remembered_of_requests() {
        let place = Place::new();
        let module = place.module("m", &module::echo(&["on_request_headers", "on_response_headers"]));
        let agent = place.start(&module, &[]);
        let mut connection = agent.connect();
        connection.get("a", "/known");
        let agent = place.replace(agent, &module, &[]);
        let seen = module::seen(&connection.ask(kind::RESPONSE_HEADERS, &response("a", 200)));
        assert_eq!(seen["uri"], "/known");
        agent.end_unharmed();
    }

    #[test]
    fn gets_the_chunks_of_collected_bodies() {
        let place = Place::new();
        let module = place.module("m", &module::echo(&["on_request_headers", "on_request_body"]));
        let options = ["--collect-request-body"];
        let mut agent = place.start(&module, &options);
        let mut connection = agent.connect();
        let mut post = request("a", "/");
        post["method"] = json!("POST");
        post["headers"]["transfer-encoding"] = json!(["chunked"]);
        connection.ask(kind::REQUEST_HEADERS, &post);
        let text = ["one ", "two ", "three"];
        let mut before = 0;
        for (index, part) in text.iter().enumerate() {
            let is_last = index == 2;
            before += part.len();
            let chunk = json!({"correlation_id": "a", "data": base64(part.as_bytes()), "is_last": is_last, "total_size": null,
                               "chunk_index": index, "bytes_received": before});
            let answer = connection.ask(kind::REQUEST_BODY, &chunk);
            assert_eq!(module_error(&answer), None, "{answer}");
            if is_last {
                assert_eq!(module::seen(&answer)["body"], "one two three");
                assert_eq!(answer["request_body_mutation"]["data"], "one two three");
            } else {
                assert_eq!(answer["needs_more"], true, "{answer}");
                agent = place.replace(agent, &module, &options);
            }
        }
        agent.end_unharmed();
    }

    #[test]
    fn gets_busy_connections_when_they_are_answered() {
        let place = Place::new();
        let old = place.module("old", &module::busy(3000, "old"));
        let new = place.module("new", &module::tagging("new"));
        let mut agent = place.start(&old, &[]);
        let (mut busy, mut idle) = (agent.connect(), agent.connect());
        busy.send(kind::REQUEST_HEADERS, &request("slow", "/"));
        let next = place.start(&new, &[]);
        busy.send(kind::REQUEST_HEADERS, &request("next", "/"));
        assert_eq!(tag(&idle.get("a", "/")), "new");
        let answers = [busy.answer(), busy.answer()];
        assert_eq!(answers.each_ref().map(|answer| (id_of(answer), tag(answer))), [("slow", "old"), ("next", "new")]);
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log.whole());
        next.end_unharmed();
    }

    #[test]
    fn loses_no_event_in_twenty_takeovers() {
        let place = Place::new();
        let module = place.module("m", &module::judging());
        let mut agent = Some(place.start(&module, &[]));
        under_load(&place.socket(), || {
            for _ in 0..20 {
                agent = agent.take().map(|agent| place.replace(agent, &module, &[]));
            }
        });
        agent.unwrap().end_unharmed();
    }

    #[test]
    fn gets_the_other_addresses_too() {
        let place = Place::new();
        let module = place.module("m", &module::tagging("any"));
        let options = ["--admin-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0"];
        let agent = place.start(&module, &options);
        let admin = agent.admin();
        let grpc = |agent: &Agent| {
            let line = agent.log.wait_for_line("the gRPC address", |line| line.contains("serving gRPC on"));
            line.split_once("gRPC on ").unwrap().1.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect::<String>()
        };
        let address = grpc(&agent);
        let next = place.replace(agent, &module, &options);
        assert_eq!((next.admin().0, grpc(&next)), (admin.0, address.clone()));
        assert_eq!(admin.get("/readyz").0, 200);
        std::net::TcpStream::connect(address).unwrap();
        next.end_unharmed();
    }

    #[test]
    fn is_not_needed() {
        let place = Place::new();
        let module = place.module("m", &module::tagging("any"));
        for _ in 0..2 {
            let mut agent = place.start(&module, &[]);
            assert_eq!(tag(&agent.connect().get("a", "/")), "any");
            assert_eq!(std::fs::metadata(place.control()).unwrap().permissions().mode() & 0o777, 0o600);
            // Its files stay behind, and are replaced by the next.
            agent.signal(Signal::KILL);
            agent.wait();
        }
    }
}

mod a_failed_takeover {
    use super::*;

    /// Talks to the control socket like a new process, and returns the connection when everything
    /// has been handed over.
    fn take(place: &Place, hello: &Value) -> UnixStream {
        let mut stream = UnixStream::connect(place.control()).unwrap();
        let mut send = |kind: u8, payload: &[u8]| {
            let header = [&b"ZWA1"[..], &[kind, 0], &(payload.len() as u32).to_be_bytes()].concat();
            stream.write_all(&[&header, payload].concat()).unwrap();
        };
        send(1, hello.to_string().as_bytes());
        send(4, b"");
        // Descriptors that are not asked for are closed by the kernel.
        let mut header = [0; 10];
        for expected in [2, 5, 6] {
            stream.read_exact(&mut header).unwrap();
            assert_eq!(header[4], expected);
            let mut payload = vec![0; u32::from_be_bytes(header[6..].try_into().unwrap()) as usize];
            stream.read_exact(&mut payload).unwrap();
        }
        stream
    }

    #[track_caller]
    fn wait_until_it_goes_on(agent: &Agent) {
        agent.log.wait_for_line("it goes on", |line| line.contains("has not taken over, so this one goes on"));
    }

    #[test]
    fn because_of_the_module_changes_nothing() {
        let place = Place::new();
        let module = place.module("m", &module::tagging("old"));
        let agent = place.start(&module, &[]);
        let mut connection = agent.connect();
        let mut next = place.launch(&place.module("bad", "(module)"), &[]);
        assert_eq!(next.wait().code(), Some(1));
        assert_eq!(tag(&connection.get("a", "/")), "old");
        assert_eq!(tag(&agent.connect().get("b", "/")), "old");
        agent.end_unharmed();
    }

    #[test]
    fn because_of_the_proxy_s_configuration_changes_nothing() {
        let place = Place::new();
        let agent = place.start(&place.module("old", &module::tagging("old")), &[]);
        let mut connection = agent.connect();
        connection.configure(&json!({"module-config": "\"!\""})).unwrap();
        let mut next = place.launch(&place.module("new", &module::configurable()), &[]);
        assert_eq!(next.wait().code(), Some(1));
        let log = next.log.whole();
        assert!(log.contains("cannot take over from the agent that serves") && log.contains("no exclamation marks"), "{log}");
        assert_eq!(tag(&connection.get("a", "/")), "old");
        agent.end_unharmed();
    }

    #[test]
    fn because_the_other_process_dies_changes_nothing() {
        let place = Place::new();
        let agent = place.start(&place.module("m", &module::tagging("old")), &[]);
        let mut connection = agent.connect();
        for round in 0..3 {
            drop(take(&place, &json!({"state_version": 1})));
            assert_eq!(tag(&connection.get(&format!("{round}"), "/")), "old");
        }
        wait_until_it_goes_on(&agent);
        let next = place.replace(agent, &place.module("new", &module::tagging("new")), &[]);
        assert_eq!(tag(&connection.get("a", "/")), "new");
        next.end_unharmed();
    }

    #[test]
    fn because_it_is_not_confirmed_changes_nothing() {
        let place = Place::new();
        let agent = place.start(&place.module("m", &module::tagging("old")), &[]);
        let mut connection = agent.connect();
        let event = event("a");
        connection.send_raw(&event[..9]);
        let mut silent = take(&place, &json!({"state_version": 1}));
        connection.send_raw(&event[9..]);
        assert_eq!(tag(&connection.answer()), "old");
        wait_until_it_goes_on(&agent);
        assert_eq!(silent.read(&mut [0]).unwrap(), 0, "it is never allowed to serve");
        agent.end_unharmed();
    }

    #[test]
    fn of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let place = Place::new();
        std::fs::set_permissions(place.0.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let module = place.module("m", &module::tagging("old"));
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let agent = AGENT.launch_in(home, place.socket(), &module, |command| {
            command.arg("--takeover").args(AMPLE).uid(65_534);
        });
        agent.log.wait_until_serving();
        let mut connection = agent.connect();
        let mut next = place.launch(&module, &[]);
        assert_eq!(next.wait().code(), Some(1));
        let log = next.log.whole();
        assert!(log.contains("the other process belongs to the user 65534, this one to 0"), "{log}");
        assert_eq!(tag(&connection.get("a", "/")), "old");
        agent.end_unharmed();
    }

    /// An old process that ends while the new one compiles its module.
    #[test]
    fn is_not_needed_when_the_old_process_ends_meanwhile() {
        let place = Place::new();
        let listener = UnixListener::bind(place.socket()).unwrap();
        let control = UnixListener::bind(place.control()).unwrap();
        let file = std::fs::metadata(place.socket()).unwrap();
        let manifest = json!({
            "state_version": 1, "socket": {"path": {"Unix": place.socket().to_str().unwrap().as_bytes()}, "id": [file.dev(), file.ino()]},
        });
        let manifest = manifest.to_string().into_bytes();
        let agent = place.launch(&place.module("m", &module::tagging("new")), &[]);
        let mut stream = control.accept().unwrap().0;
        // Before the answer, so the next attempt finds nobody.
        drop((listener, control));
        let header = [&b"ZWA1\x02\0"[..], &(manifest.len() as u32).to_be_bytes()].concat();
        stream.write_all(&[header, manifest].concat()).unwrap();
        agent.log.wait_for_line("why", |line| line.contains("has ended, so there is nothing to take over"));
        agent.log.wait_until_serving();
        assert_eq!(tag(&agent.connect().get("a", "/")), "new");
        agent.end_unharmed();
    }

    #[test]
    fn by_nonsense_changes_nothing() {
        let place = Place::new();
        let agent = place.start(&place.module("m", &module::tagging("old")), &[]);
        let mut connection = agent.connect();
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"ZWA9\x01\0\0\0\0\0", b"ZWA1\x04\0\0\0\0\0", b"ZWA1\x01\0\xff\xff\xff\xff", b""] {
            let mut stream = UnixStream::connect(place.control()).unwrap();
            stream.write_all(bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            // Closed, possibly with bytes that were not read.
            let _ = stream.read(&mut [0]);
        }
        assert_eq!(tag(&connection.get("a", "/")), "old");
        agent.log.wait_for_line("why", |line| line.contains("speaks another version of the takeover protocol"));
        let next = place.replace(agent, &place.module("new", &module::tagging("new")), &[]);
        assert_eq!(tag(&connection.get("b", "/")), "new");
        next.end_unharmed();
    }
}

mod another_version {
    use std::fs::File;
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd as _, BorrowedFd};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    /// Reads a message of this kind.
    #[track_caller]
    fn expect(stream: &mut UnixStream, kind: u8) {
        let mut header = [0; 10];
        stream.read_exact(&mut header).unwrap();
        assert_eq!(header[4], kind);
        let mut payload = vec![0; u32::from_be_bytes(header[6..].try_into().unwrap()) as usize];
        stream.read_exact(&mut payload).unwrap();
    }

    fn send(stream: &UnixStream, kind: u8, payload: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let message = [&b"ZWA1"[..], &[kind, descriptors.len() as u8], &(payload.len() as u32).to_be_bytes(), payload].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        assert_eq!(sendmsg(stream, &[IoSlice::new(&message)], &mut control, SendFlags::empty()).unwrap(), message.len());
    }

    /// A later version that is replaced by this one, as when an upgrade is taken back.
    #[test]
    fn hands_over_the_socket_only() {
        let place = Place::new();
        let module = place.module("m", &module::tagging("new"));
        let listener = UnixListener::bind(place.socket()).unwrap();
        let control = UnixListener::bind(place.control()).unwrap();
        let file = std::fs::metadata(place.socket()).unwrap();
        let manifest = json!({
            "version": "9.0.0", "state_version": 99, "connections": 0, "config": null, "unknown": {"to": "this version"},
            "socket": {"path": {"Unix": place.socket().to_str().unwrap().as_bytes()}, "id": [file.dev(), file.ino()], "more": 1},
        });
        let manifest = manifest.to_string().into_bytes();
        // Connected to the old process before the new one serves.
        let mut early = UnixStream::connect(place.socket()).unwrap();
        early.write_all(&frame(kind::HANDSHAKE_REQUEST, br#"{"supported_versions":[2],"proxy_version":"0.6.54"}"#)).unwrap();
        let agent = place.launch(&module, &[]);
        // The new process asks what is served, and later for everything.
        let mut stream = control.accept().unwrap().0;
        expect(&mut stream, 1);
        send(&stream, 2, &manifest, &[]);
        let mut stream = control.accept().unwrap().0;
        expect(&mut stream, 1);
        send(&stream, 2, &manifest, &[]);
        expect(&mut stream, 4);
        let memory = rustix::fs::memfd_create("handover", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut memory = File::from(memory);
        let contents = [&(manifest.len() as u32).to_be_bytes()[..], &manifest, b"a state that only version 9 understands"].concat();
        memory.write_all(&contents).unwrap();
        send(&stream, 5, b"", &[memory.as_fd()]);
        send(&stream, 6, b"", &[listener.as_fd()]);
        expect(&mut stream, 7);
        drop((listener, control));
        std::fs::remove_file(place.control()).unwrap();
        send(&stream, 8, b"", &[]);
        send(&stream, 9, b"", &[]);
        agent.log.wait_for_line("why", |line| line.contains("version 9.0.0, hands over its listeners only"));
        assert_eq!(testkit::read_frame(&mut early).unwrap().unwrap().0, kind::HANDSHAKE_RESPONSE);
        assert_eq!(tag(&agent.connect().get("a", "/")), "new");
        agent.end_unharmed();
    }

    /// With another state version, the connections stay with the old process until it has drained.
    #[test]
    fn gets_the_listeners_only() {
        let place = Place::new();
        let mut agent = place.start(&place.module("m", &module::tagging("old")), &[]);
        let mut connection = agent.connect();
        assert_eq!(tag(&connection.get("a", "/")), "old");
        let mut stream = UnixStream::connect(place.control()).unwrap();
        let message = |kind: u8, payload: &[u8]| [&b"ZWA1"[..], &[kind, 0], &(payload.len() as u32).to_be_bytes(), payload].concat();
        // What the next version may say.
        stream.write_all(&message(1, br#"{"version":"9.0.0","state_version":99,"more":true}"#)).unwrap();
        stream.write_all(&message(4, b"")).unwrap();
        stream.write_all(&message(7, b"")).unwrap();
        let mut answered = Vec::new();
        stream.read_to_end(&mut answered).unwrap();
        agent.log.wait_for_line("why", |line| line.contains("handing over listeners only: version 9.0.0 has another format"));
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log.whole());
        assert_eq!(connection.answer_or_end(), None, "the connection has drained");
        assert!(place.socket().exists(), "the socket belongs to the other process");
    }
}

mod the_descriptor_store {
    use super::*;

    /// A service, and its service manager.
    struct Service {
        place: Place,
        manager: ServiceManager,
    }

    impl Service {
        fn new() -> Self {
            Self { place: Place::new(), manager: ServiceManager::start() }
        }

        /// Starts a process of the service without waiting.
        fn launch(&self, module: &Path, options: &[&str]) -> Agent {
            let home = tempfile::tempdir().unwrap();
            let mut command: Command = AGENT.command(home.path());
            command.arg("--socket").arg(self.place.socket()).arg("--module").arg(module).args(AMPLE).args(options);
            Agent::spawn(home, self.place.socket(), self.manager.service(&command))
        }

        #[track_caller]
        fn start(&self, module: &Path, options: &[&str]) -> Agent {
            let agent = self.launch(module, options);
            agent.log.wait_until_serving();
            agent
        }

        #[track_caller]
        fn stop(&self, agent: Agent) {
            agent.end_unharmed();
            assert_eq!(self.manager.stored(), 1);
        }

        #[track_caller]
        fn restart(&self, agent: Agent, module: &Path, options: &[&str]) -> Agent {
            self.stop(agent);
            let next = self.start(module, options);
            wait_for("the store to be empty", || (self.manager.stored() == 0).then_some(()));
            next
        }
    }

    #[test]
    fn keeps_connections_over_a_restart() {
        let service = Service::new();
        let [old, new] = ["old", "new"].map(|tag| service.place.module(tag, &module::tagging(tag)));
        let agent = service.start(&old, &[]);
        let mut connection = agent.connect();
        assert_eq!(tag(&connection.get("a", "/")), "old");
        connection.configure(&json!({"pool-size": 2})).unwrap();
        let event = event("b");
        connection.send_raw(&event[..7]);
        service.stop(agent);
        connection.send_raw(&event[7..]);
        // Waits in the queue of the socket.
        let mut early = UnixStream::connect(service.place.socket()).unwrap();
        early.write_all(&frame(kind::HANDSHAKE_REQUEST, br#"{"supported_versions":[2],"proxy_version":"0.6.54"}"#)).unwrap();
        let agent = service.start(&new, &["--admin-address", "127.0.0.1:0"]);
        let answer = connection.answer();
        assert_eq!((id_of(&answer), tag(&answer)), ("b", "new"));
        assert_eq!(testkit::read_frame(&mut early).unwrap().unwrap().0, kind::HANDSHAKE_RESPONSE);
        agent.admin().wait_for_metric("wasm_agent_pool_available", 2.0);
        wait_for("the store to be empty", || (service.manager.stored() == 0).then_some(()));
        assert_eq!(service.manager.notified("READY=1"), 2);
        service.stop(agent);
    }

    #[test]
    fn keeps_them_while_the_next_process_fails_to_start() {
        let service = Service::new();
        let module = service.place.module("m", &module::tagging("any"));
        let agent = service.start(&module, &[]);
        let mut connection = agent.connect();
        service.stop(agent);
        connection.send_raw(&event("a"));
        let bad = service.place.module("bad", "(module)");
        for _ in 0..3 {
            assert_eq!(service.launch(&bad, &[]).wait().code(), Some(1));
            assert_eq!(service.manager.stored(), 1);
        }
        let agent = service.start(&module, &[]);
        assert_eq!(tag(&connection.answer()), "any");
        service.stop(agent);
    }

    #[test]
    fn closes_them_with_a_process_that_crashes() {
        let service = Service::new();
        let module = service.place.module("m", &module::tagging("any"));
        let agent = service.start(&module, &[]);
        let mut connection = agent.connect();
        let mut agent = service.restart(agent, &module, &[]);
        assert_eq!(tag(&connection.get("a", "/")), "any");
        agent.signal(Signal::KILL);
        agent.wait();
        assert_eq!(connection.answer_or_end(), None);
        let agent = service.start(&module, &[]);
        assert_eq!(tag(&agent.connect().get("b", "/")), "any");
        service.stop(agent);
    }

    /// The process goes on with its connections, so the next one must not get them, although the
    /// store has them.
    #[test]
    fn is_empty_if_it_does_not_answer() {
        let service = Service::new();
        let module = service.place.module("m", &module::tagging("any"));
        let mut agent = service.start(&module, &[]);
        let mut connection = agent.connect();
        connection.send_raw(&event("a")[..9]);
        service.manager.get_stuck();
        agent.signal(Signal::TERM);
        agent.log.wait_for_line("why", |line| line.contains("cannot leave connections in the descriptor store"));
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log.whole());
        assert_eq!((connection.answer_or_end(), service.manager.stored()), (None, 1));
        let agent = service.start(&module, &[]);
        agent.log.wait_for_line("why", |line| line.contains("nothing to take over from the descriptor store"));
        assert_eq!(tag(&agent.connect().get("b", "/")), "any");
    }

    #[test]
    fn closes_them_when_the_service_stops() {
        let service = Service::new();
        let agent = service.start(&service.place.module("m", &module::tagging("any")), &[]);
        let mut connection = agent.connect();
        assert_eq!(tag(&connection.get("a", "/")), "any");
        service.stop(agent);
        service.manager.close_store();
        assert_eq!(connection.answer_or_end(), None);
    }

    #[test]
    fn loses_no_event_in_twenty_restarts() {
        let service = Service::new();
        let module = service.place.module("m", &module::judging());
        let mut agent = Some(service.start(&module, &[]));
        under_load(&service.place.socket(), || {
            for _ in 0..20 {
                agent = agent.take().map(|agent| service.restart(agent, &module, &[]));
            }
        });
        service.stop(agent.unwrap());
    }

    #[test]
    fn works_with_takeovers_in_between() {
        let service = Service::new();
        let module = service.place.module("m", &module::tagging("any"));
        let takeover = ["--takeover"];
        let mut agent = service.start(&module, &takeover);
        let mut connection = agent.connect();
        for round in 0..3 {
            let next = service.start(&module, &takeover);
            assert_eq!(agent.wait().code(), Some(0), "{}", agent.log.whole());
            let pid = format!("MAINPID={}", next.pid().as_raw_nonzero());
            wait_for("the new process to be the main process", || (service.manager.notified(&pid) == 1).then_some(()));
            agent = service.restart(next, &module, &takeover);
            assert_eq!(tag(&connection.get(&format!("{round}"), "/")), "any");
        }
        service.stop(agent);
    }
}
