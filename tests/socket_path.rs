//! What the agent does when its socket is removed or replaced while it runs.

use std::fs;

use rustix::process::Signal;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use tempfile::TempDir;
use testkit::{Admin, Agent, Connection, Program, module, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// An agent whose socket is in a folder of its own.
struct Served {
    agent: Agent,
    admin: Admin,
    module: TempDir,
}

impl Served {
    fn start(options: &[&str]) -> Self {
        let module = tempfile::tempdir().unwrap();
        let file = module::write(module.path(), "m.wasm", &module::tagging("served"));
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("run")).unwrap();
        let agent = AGENT.launch_in(home, "run/wasm.sock", &file, |command| {
            command.args(["--admin-address", "127.0.0.1:0"]).args(options);
        });
        agent.log.wait_until_serving();
        let admin = agent.admin();
        Self { agent, admin, module }
    }

    fn socket(&self) -> &Path {
        &self.agent.socket
    }

    fn folder(&self) -> &Path {
        self.agent.socket.parent().unwrap()
    }

    #[track_caller]
    fn wait_until_ready(&self) {
        wait_for("the socket to be served", || UnixStream::connect(self.socket()).ok());
        wait_for("the agent to be ready", || (self.admin.get("/readyz").0 == 200).then_some(()));
        assert_eq!(self.admin.get("/healthz").1, "healthy\n");
        check(&mut self.agent.connect());
    }

    /// Waits until health names the reason, and checks that the agent is not ready.
    #[track_caller]
    fn wait_until_unready(&self, reason: &str) {
        wait_for(&format!("the health with the reason: {reason}"), || {
            let health = self.admin.get("/healthz").1;
            (health.starts_with("degraded: ") && health.contains(reason)).then_some(())
        });
        assert_eq!(self.admin.get("/readyz").0, 503);
    }
}

#[track_caller]
fn check(connection: &mut Connection) {
    let answer = connection.get("id", "/");
    assert_eq!(answer["audit"]["tags"][0], "served", "{answer}");
}

mod removed {
    use super::*;

    #[test]
    fn socket_is_bound_again_without_closing_connections() {
        let served = Served::start(&["--socket-mode", "640"]);
        let mut connection = served.agent.connect();
        check(&mut connection);
        for _ in 0..3 {
            fs::remove_file(served.socket()).unwrap();
            served.wait_until_ready();
            check(&mut connection);
            assert_eq!(fs::metadata(served.socket()).unwrap().permissions().mode() & 0o777, 0o640);
        }
        served.agent.log.wait_for_entry("the warning", |entry| {
            entry["level"] == "WARN"
                && entry["message"].as_str().is_some_and(|message| message.contains("was removed or replaced; bound it again"))
        });
        let socket = served.socket().to_owned();
        served.agent.end();
        assert!(!socket.exists());
    }

    #[test]
    fn folder_is_awaited() {
        let served = Served::start(&[]);
        let mut connection = served.agent.connect();
        fs::remove_dir_all(served.folder()).unwrap();
        served.wait_until_unready("No such file or directory (os error 2); create the folder `");
        check(&mut connection);
        assert!(!served.folder().exists());
        fs::create_dir(served.folder()).unwrap();
        served.wait_until_ready();
        check(&mut connection);
        let log = served.agent.log.clone();
        served.agent.end();
        let log = log.whole();
        assert_eq!(log.lines().filter(|line| line.contains("retrying to bind it")).count(), 1, "{log}");
        assert!(log.contains("is reachable again"), "{log}");
    }

    #[test]
    fn and_returned_socket_is_still_served() {
        let served = Served::start(&[]);
        fs::rename(served.folder(), served.agent.home.path().join("elsewhere")).unwrap();
        served.wait_until_unready("No such file or directory");
        fs::rename(served.agent.home.path().join("elsewhere"), served.folder()).unwrap();
        served.wait_until_ready();
        served.agent.end();
    }

    #[test]
    fn socket_and_a_failed_reload_are_both_reported() {
        let served = Served::start(&[]);
        fs::write(served.module.path().join("m.wasm"), "not a module").unwrap();
        served.agent.signal(Signal::HUP);
        wait_for("the reload to fail", || served.admin.get("/healthz").1.contains("cannot serve the module").then_some(()));
        assert_eq!(served.admin.get("/readyz").0, 200);
        fs::remove_dir_all(served.folder()).unwrap();
        served.wait_until_unready("; reload failed: cannot serve the module");
    }
}

mod foreign {
    use super::*;

    /// Connects without waiting to be accepted.
    fn try_connect(path: &Path) -> Option<socket2::Socket> {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.connect(&socket2::SockAddr::unix(path).unwrap()).ok().map(|()| socket)
    }

    #[test]
    fn socket_is_left_alone_while_it_is_served() {
        let served = Served::start(&[]);
        let mut connection = served.agent.connect();
        let other = UnixListener::bind(served.folder().join("other")).unwrap();
        fs::rename(served.folder().join("other"), served.socket()).unwrap();
        served.wait_until_unready("already served by another process");
        check(&mut connection);
        // The other process still serves it.
        let _client = UnixStream::connect(served.socket()).unwrap();
        drop(other);
        // The file is a stale socket now.
        served.wait_until_ready();
        served.agent.end();
    }

    #[test]
    fn socket_is_left_alone_at_the_end() {
        let mut served = Served::start(&[]);
        let other = UnixListener::bind(served.folder().join("other")).unwrap();
        fs::rename(served.folder().join("other"), served.socket()).unwrap();
        served.wait_until_unready("already served by another process");
        served.agent.signal(Signal::TERM);
        assert_eq!(served.agent.wait().code(), Some(0));
        let _client = UnixStream::connect(served.socket()).unwrap();
        drop(other);
    }

    #[test]
    fn socket_counts_as_served_even_if_its_queue_is_full() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("wasm.sock");
        let _first = UnixListener::bind(&socket).unwrap();
        // As many connections as the system queues.
        let mut waiting = Vec::new();
        while let Some(client) = try_connect(&socket) {
            waiting.push(client);
            assert!(waiting.len() < 100_000);
        }
        let mut agent = AGENT.launch_in(home, "wasm.sock", &module, |_| ());
        assert_eq!(agent.wait().code(), Some(1));
        let log = agent.log.whole();
        assert!(log.contains("already served by another process"), "{log}");
    }

    #[test]
    fn file_is_never_removed() {
        let served = Served::start(&[]);
        let precious = served.folder().join("precious");
        fs::write(&precious, "precious").unwrap();
        fs::rename(&precious, served.socket()).unwrap();
        served.wait_until_unready("the path exists and is not a socket");
        assert_eq!(fs::read_to_string(served.socket()).unwrap(), "precious");
        fs::remove_file(served.socket()).unwrap();
        served.wait_until_ready();
        served.agent.end();
    }
}

mod start {
    use super::*;

    #[test]
    fn fails_on_a_path_that_is_too_long() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("a"));
        let mut agent = AGENT.launch_in(tempfile::tempdir().unwrap(), "s".repeat(108), &module, |_| ());
        assert_eq!(agent.wait().code(), Some(1));
        let log = agent.log.whole();
        assert!(log.contains("choose a shorter `--socket`"), "{log}");
    }

    #[test]
    fn fails_without_the_folder_and_names_it() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("a"));
        let message = |socket: &str| {
            let home = tempfile::tempdir().unwrap();
            fs::write(home.path().join("file"), "").unwrap();
            let shown = home.path().display().to_string();
            let mut agent = AGENT.launch_in(home, socket, &module, |_| ());
            assert_eq!(agent.wait().code(), Some(1));
            agent.log.whole().replace(&shown, "HOME")
        };
        assert_eq!(
            message("run/wasm.sock"),
            "zentinel-wasm-agent: cannot serve the socket `HOME/run/wasm.sock`: No such file or directory (os error 2); \
             create the folder `HOME/run`"
        );
        assert_eq!(
            message("file/wasm.sock"),
            "zentinel-wasm-agent: cannot serve the socket `HOME/file/wasm.sock`: Not a directory (os error 20); \
             `HOME/file` is not a folder: choose another `--socket`"
        );
    }
}
