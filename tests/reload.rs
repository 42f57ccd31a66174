//! The files that a reload reads, the changes that `--watch` notices, and failed reloads, which
//! change nothing.

#[path = "common/grpc.rs"]
mod client;

use client::{AMPLE, Authority, Client, get, is_allow};
use rustix::process::{Resource, Rlimit, Signal};
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use tempfile::TempDir;
use testkit::{Admin, Agent, Connection, Program, module, module_error, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const RELOADED: &str = r#"wasm_agent_reloads_total{result="success"}"#;

const NOT_RELOADED: &str = r#"wasm_agent_reloads_total{result="failure"}"#;

/// A directory with a module that returns its configuration, and that configuration.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.module(&module::configurable());
        files.config(r#"{"rules":1}"#);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn module(&self, wat: &str) {
        module::write(self.0.path(), "m.wasm", wat);
    }

    fn config(&self, json: &str) {
        // In place, as some editors write.
        fs::write(self.path("config.json"), json).unwrap();
    }

    fn start(&self, options: &[&str]) -> (Agent, Admin) {
        let config = format!("@{}", self.path("config.json").display());
        let common = ["--module-config", &config, "--admin-address", "127.0.0.1:0"];
        let agent = AGENT.start(&self.path("m.wasm"), &[&AMPLE[..], &common, options].concat());
        let admin = agent.admin();
        (agent, admin)
    }
}

/// The current configuration, as a [`module::configurable`] returns it.
#[track_caller]
fn rules(connection: &mut Connection) -> Value {
    module::seen(&connection.get("rules", "/"))
}

/// The tag of a [`module::tagging`].
#[track_caller]
fn tag(connection: &mut Connection) -> String {
    let answer = connection.get("tag", "/");
    assert_eq!(module_error(&answer), None, "{answer}");
    answer["audit"]["tags"][0].as_str().unwrap_or_else(|| panic!("no tag in {answer}")).to_owned()
}

/// A connection over TLS with an open stream.
async fn stream(agent: &Agent, authority: &Authority) -> client::Stream {
    Client::new(authority.connect(agent, None).await.unwrap()).process().await
}

mod sighup {
    use super::*;

    #[test]
    fn reads_the_configuration_file_again() {
        let files = Files::new();
        let (agent, admin) = files.start(&[]);
        let mut connection = agent.connect();
        assert_eq!(rules(&mut connection), json!({"rules": 1}));
        files.config(r#"{"rules":2}"#);
        agent.signal(Signal::HUP);
        admin.wait_for_metric(RELOADED, 1.0);
        assert_eq!(rules(&mut connection), json!({"rules": 2}));
        // The proxy's settings have precedence over the file, and others come from the file.
        connection.configure(&json!({"pool-size": 2})).unwrap();
        assert_eq!(rules(&mut connection), json!({"rules": 2}));
        agent.end();
    }

    #[test]
    fn keeps_a_configuration_from_a_pipe() {
        let files = Files::new();
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(br#"{"rules":"piped"}"#).unwrap();
        drop(writer);
        let agent = AGENT.start_with(&files.path("m.wasm"), |command| {
            command.args(["--module-config", "@/dev/stdin", "--admin-address", "127.0.0.1:0"]).stdin(Stdio::from(reader));
        });
        let mut connection = agent.connect();
        assert_eq!(rules(&mut connection), json!({"rules": "piped"}));
        agent.signal(Signal::HUP);
        agent.admin().wait_for_metric(RELOADED, 1.0);
        assert_eq!(rules(&mut connection), json!({"rules": "piped"}));
        agent.end();
    }

    #[test]
    fn does_not_make_the_watch_reload_again() {
        let files = Files::new();
        let (agent, admin) = files.start(&["--watch"]);
        let mut connection = agent.connect();
        for number in 2..=4 {
            // While the agent is stopped, the watch cannot notice the change before the signal
            // does.
            agent.signal(Signal::STOP);
            files.config(&json!({"rules": number}).to_string());
            agent.signal(Signal::HUP);
            agent.signal(Signal::CONT);
            wait_for("the new rules", || (rules(&mut connection) == json!({"rules": number})).then_some(()));
        }
        // A change without a signal, so the watch has looked at all of the above.
        files.config(r#"{"rules":5}"#);
        wait_for("the new rules", || (rules(&mut connection) == json!({"rules": 5})).then_some(()));
        wait_for("the reload to be counted", || (admin.metric(RELOADED) >= 4.0).then_some(()));
        assert_eq!(admin.metric(RELOADED), 4.0);
        agent.end();
    }
}

mod watch {
    use super::*;

    /// Makes `directory/..data` a link to a new folder with `files`, as Kubernetes does for a
    /// ConfigMap. The links to the files do not change.
    fn swap_config_map(directory: &Path, generation: u32, files: &[(&str, &[u8])]) {
        let folder = directory.join(format!("..generation-{generation}"));
        fs::create_dir(&folder).unwrap();
        for (name, contents) in files {
            fs::write(folder.join(name), contents).unwrap();
        }
        let next = directory.join("..data_tmp");
        symlink(folder.file_name().unwrap(), &next).unwrap();
        let before = fs::read_link(directory.join("..data")).ok();
        fs::rename(next, directory.join("..data")).unwrap();
        if let Some(before) = before {
            fs::remove_dir_all(directory.join(before)).unwrap();
        }
    }

    /// Limits the number of files that the agent may open. Returns the previous limit.
    fn limit_files(agent: &Agent, limit: Option<u64>) -> Option<u64> {
        // The agent has inherited the hard limit.
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        rustix::process::prlimit(Some(agent.pid()), Resource::Nofile, Rlimit { current: limit, maximum }).unwrap().current
    }

    #[test]
    fn notices_the_configuration_file() {
        let files = Files::new();
        let (agent, _) = files.start(&["--watch"]);
        let mut connection = agent.connect();
        files.config(r#"{"rules":2}"#);
        wait_for("the new rules", || (rules(&mut connection) == json!({"rules": 2})).then_some(()));
        agent.end();
    }

    #[test]
    fn notices_the_swap_of_a_config_map() {
        let map = tempfile::tempdir().unwrap();
        let module = wat::parse_str(module::configurable()).unwrap();
        let swap = |generation: u32| {
            let config = json!({"rules": generation}).to_string();
            swap_config_map(map.path(), generation, &[("m.wasm", &module), ("config.json", config.as_bytes())]);
        };
        swap(1);
        for name in ["m.wasm", "config.json"] {
            symlink(Path::new("..data").join(name), map.path().join(name)).unwrap();
        }
        let config = format!("@{}", map.path().join("config.json").display());
        let agent = AGENT.start(&map.path().join("m.wasm"), &[&AMPLE[..], &["--watch", "--module-config", &config]].concat());
        let mut connection = agent.connect();
        for generation in 1..=3 {
            wait_for("the new rules", || (rules(&mut connection) == json!({"rules": generation})).then_some(()));
            swap(generation + 1);
        }
        agent.end();
    }

    #[test]
    fn notices_a_replaced_directory() {
        let home = tempfile::tempdir().unwrap();
        let make = |name: &str, tag: &str| {
            fs::create_dir(home.path().join(name)).unwrap();
            module::write(&home.path().join(name), "m.wasm", &module::tagging(tag))
        };
        let agent = AGENT.start(&make("live", "first"), &[&AMPLE[..], &["--watch"]].concat());
        let mut connection = agent.connect();
        make("next", "second");
        fs::rename(home.path().join("live"), home.path().join("old")).unwrap();
        fs::rename(home.path().join("next"), home.path().join("live")).unwrap();
        wait_for("the new module", || (tag(&mut connection) == "second").then_some(()));
        agent.end();
    }

    #[test]
    fn notices_a_change_that_keeps_size_and_time() {
        let files = Files::new();
        let (agent, _) = files.start(&["--watch"]);
        let mut connection = agent.connect();
        let config = files.path("config.json");
        let modified = fs::metadata(&config).unwrap().modified().unwrap();
        let mut file = fs::OpenOptions::new().write(true).open(&config).unwrap();
        file.write_all(br#"{"rules":2}"#).unwrap();
        file.set_modified(modified).unwrap();
        wait_for("the new rules", || (rules(&mut connection) == json!({"rules": 2})).then_some(()));
        agent.end();
    }

    #[test]
    fn reads_a_file_once_it_becomes_readable() {
        let files = Files::new();
        // Root can read everything, so the agent runs as another user.
        let is_root = rustix::process::geteuid().is_root();
        let config = files.path("config.json");
        if is_root {
            fs::set_permissions(files.0.path(), Permissions::from_mode(0o755)).unwrap();
            for name in ["m.wasm", "config.json"] {
                fs::set_permissions(files.path(name), Permissions::from_mode(0o644)).unwrap();
            }
        }
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), Permissions::from_mode(0o777)).unwrap();
        let agent = AGENT.launch_in(home, "wasm.sock", &files.path("m.wasm"), |command| {
            command.args(["--watch", "--admin-address", "127.0.0.1:0", "--module-config"]).arg(format!("@{}", config.display()));
            if is_root {
                const NOBODY: u32 = 65534;
                command.uid(NOBODY).gid(NOBODY);
            }
        });
        let admin = agent.admin();
        wait_for("the start", || (admin.get("/readyz").0 == 200).then_some(()));
        // Renamed into place, so it is never readable there.
        let next = files.path("next.json");
        fs::write(&next, r#"{"rules":2}"#).unwrap();
        fs::set_permissions(&next, Permissions::from_mode(0o000)).unwrap();
        fs::rename(&next, &config).unwrap();
        wait_for("a failed reload", || (admin.metric(NOT_RELOADED) >= 1.0).then_some(()));
        let health = admin.get("/healthz").1;
        assert!(health.contains("config.json") && health.contains("Permission denied"), "{health}");
        assert_eq!(rules(&mut agent.connect()), json!({"rules": 1}));
        fs::set_permissions(&config, Permissions::from_mode(0o644)).unwrap();
        wait_for("the new rules", || (rules(&mut agent.connect()) == json!({"rules": 2})).then_some(()));
        // The result is recorded after the new module serves.
        wait_for("the agent to be healthy", || (admin.get("/healthz").1 == "healthy\n").then_some(()));
        agent.end();
    }

    #[test]
    fn recovers_when_a_missing_file_returns() {
        let files = Files::new();
        let (agent, admin) = files.start(&["--watch"]);
        let mut connection = agent.connect();
        let elsewhere = files.path("elsewhere");
        fs::rename(files.path("config.json"), &elsewhere).unwrap();
        wait_for("a failed reload", || (admin.metric(NOT_RELOADED) >= 1.0).then_some(()));
        assert!(admin.get("/healthz").1.contains("config.json"));
        agent.log.wait_for_line("the cause", |line| line.contains("reloading because a watched file is missing"));
        assert_eq!(admin.metric("wasm_agent_last_reload_successful"), 0.0);
        assert_eq!(rules(&mut connection), json!({"rules": 1}));
        fs::rename(&elsewhere, files.path("config.json")).unwrap();
        wait_for("the agent to be healthy", || (admin.get("/healthz").1 == "healthy\n").then_some(()));
        assert_eq!(admin.metric("wasm_agent_last_reload_successful"), 1.0);
        agent.end();
    }

    #[test]
    fn retries_a_failed_reload_without_a_change() {
        let files = Files::new();
        let agent = AGENT.start(&files.path("m.wasm"), &[&AMPLE[..], &["--watch", "--verbose"]].concat());
        agent.log.wait_until_serving();
        // No file can be opened, although the state of each is unchanged.
        let before = limit_files(&agent, Some(3));
        agent.signal(Signal::HUP);
        agent.log.wait_for_line("the failed reload", |line| line.contains("reload failed") && line.contains("m.wasm"));
        agent.log.wait_for_line("the next try", |line| line.contains("retrying the failed reload"));
        // A retry that fails for the same reason is a warning no more.
        agent.log.wait_for_entry("its failure", |entry| {
            entry["level"] == "DEBUG" && entry["message"].as_str().unwrap().starts_with("reload failed again: ")
        });
        assert_eq!(agent.log.lines().iter().filter(|line| line.contains("reload failed, keeping")).count(), 1);
        let served = || agent.log.lines().iter().filter(|line| line.contains("serving the module `")).count();
        assert_eq!(served(), 1);
        limit_files(&agent, before);
        wait_for("a reload that succeeds", || (served() == 2).then_some(()));
        agent.end();
    }
}

mod log {
    use super::*;

    /// The messages of the agent's log since its start, with their levels.
    fn since_the_start(agent: &Agent) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let entries = agent.log.entries();
        let start = entries.iter().position(|entry| text(&entry["message"]).starts_with("serving the socket")).unwrap();
        entries[start + 1..].iter().map(|entry| (text(&entry["level"]), text(&entry["message"]))).collect()
    }

    #[test]
    fn has_each_reload_once() {
        let files = Files::new();
        let (agent, admin) = files.start(&[]);
        let path = files.path("m.wasm");
        agent.signal(Signal::HUP);
        agent.log.wait_for_line("the end of the reload", |line| line.contains("reload complete"));
        assert_eq!(admin.metric("wasm_agent_last_reload_successful"), 1.0);
        fs::remove_file(&path).unwrap();
        agent.signal(Signal::HUP);
        agent.log.wait_for_line("the failed reload", |line| line.contains("reload failed"));
        assert_eq!(admin.metric("wasm_agent_last_reload_successful"), 0.0);
        let messages = since_the_start(&agent);
        let expected = [
            ("INFO", "reloading because of SIGHUP".to_owned()),
            ("INFO", format!("serving the module `{}`", path.display())),
            ("INFO", "reload complete".into()),
            ("INFO", "reloading because of SIGHUP".into()),
            (
                "WARN",
                format!(
                    "reload failed, keeping the current module, configuration and certificates: \
                     cannot serve the module `{}`: No such file or directory (os error 2)",
                    path.display()
                ),
            ),
        ];
        assert_eq!(messages, expected.map(|(level, message)| (level.to_owned(), message)));
    }
}

mod failure {
    use super::*;

    #[test]
    fn of_one_file_changes_nothing_and_names_it() {
        let files = Files::new();
        let (agent, admin) = files.start(&[]);
        let mut connection = agent.connect();
        let config = files.path("config.json").display().to_string();
        // The module is valid, so the test would notice if it served.
        files.module(&module::tagging("new"));
        for (round, (bad, reason)) in
            [("{", "EOF while parsing"), (&*"1".repeat((1 << 20) + 1), "larger than the limit"), ("", "No such file")]
                .into_iter()
                .enumerate()
        {
            match bad {
                "" => fs::remove_file(&config).unwrap(),
                bad => files.config(bad),
            }
            agent.signal(Signal::HUP);
            admin.wait_for_metric(NOT_RELOADED, (round + 1) as f64);
            assert_eq!(rules(&mut connection), json!({"rules": 1}));
            let (status, health) = admin.get("/healthz");
            assert_eq!(status, 200);
            assert!(
                health.starts_with(&format!("degraded: reload failed: cannot use `--module-config @{config}`: "))
                    && health.contains(reason),
                "{health}"
            );
            assert_eq!(admin.get("/readyz").0, 200);
        }
        agent.log.wait_for_line("the path of the invalid file", |line| {
            line.contains("reload failed, keeping the current module") && line.contains(&config)
        });
        // The proxy's settings are applied on top of the current configuration.
        connection.configure(&json!({"pool-size": 2})).unwrap();
        assert_eq!(rules(&mut connection), json!({"rules": 1}));

        files.config("{}");
        agent.signal(Signal::HUP);
        admin.wait_for_metric(RELOADED, 2.0);
        assert_eq!(tag(&mut connection), "new");
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
        agent.end();
    }

    #[test]
    fn names_a_configuration_that_the_module_rejects() {
        let files = Files::new();
        let (agent, admin) = files.start(&[]);
        files.config(r#""loud!""#);
        agent.signal(Signal::HUP);
        admin.wait_for_metric(NOT_RELOADED, 1.0);
        let health = admin.get("/healthz").1;
        assert!(health.contains("config.json") && health.contains("rejects its configuration: no exclamation marks"), "{health}");
        assert_eq!(rules(&mut agent.connect()), json!({"rules": 1}));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_a_certificate_changes_nothing_and_names_it() {
        let (authority, clients) = (Authority::new(), Authority::new());
        let directory = tempfile::tempdir().unwrap();
        let file = module::write(directory.path(), "m.wasm", &module::tagging("old"));
        let mut options = authority.options();
        options.extend(["--grpc-client-ca".into(), clients.file("root.pem").display().to_string()]);
        let agent = AGENT.start_with(&file, |command| {
            command.args(["--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0"]).args(AMPLE).args(&options);
        });
        let admin = agent.admin();
        module::write(directory.path(), "m.wasm", &module::tagging("new"));
        let (certificate, key) = (authority.file("cert.pem"), authority.file("key.pem"));
        let good = [&certificate, &key, &clients.file("root.pem")].map(|path| (path.clone(), fs::read(path).unwrap()));
        let (_, other_key) = authority.issue("localhost");
        for (round, (path, bad, named)) in [
            (&certificate, "", "--grpc-tls-cert"),
            (&key, "", "--grpc-tls-key"),
            (&key, &*other_key, "--grpc-tls-key"),
            (&good[2].0, "", "--grpc-client-ca"),
        ]
        .into_iter()
        .enumerate()
        {
            fs::write(path, bad).unwrap();
            agent.signal(Signal::HUP);
            admin.wait_for_metric(NOT_RELOADED, (round + 1) as f64);
            let health = admin.get("/healthz").1;
            assert!(health.starts_with("degraded: ") && health.contains(&format!("`{named} {}`", path.display())), "{health}");
            assert_eq!(tag(&mut agent.connect()), "old");
            authority.ask(&agent, Some(&clients)).await.unwrap();
            for (path, contents) in &good {
                fs::write(path, contents).unwrap();
            }
        }
        // Another authority for clients.
        let others = Authority::new();
        fs::copy(others.file("root.pem"), &good[2].0).unwrap();
        agent.signal(Signal::HUP);
        admin.wait_for_metric(RELOADED, 1.0);
        assert_eq!(admin.get("/healthz").1, "healthy\n");
        assert_eq!(tag(&mut agent.connect()), "new");
        assert!(authority.ask(&agent, Some(&others)).await.is_ok());
        assert!(authority.ask(&agent, Some(&clients)).await.is_err());
        agent.end();
    }
}

mod certificates {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn renewed_apply_to_new_connections_alone() {
        let (authority, renewed) = (Authority::new(), Authority::new());
        let directory = tempfile::tempdir().unwrap();
        let file = module::write(directory.path(), "m.wasm", &module::tagging("old"));
        let options = authority.options();
        for watch in [false, true] {
            authority.write_certificate(&authority);
            module::write(directory.path(), "m.wasm", &module::tagging("old"));
            let agent = AGENT.start_with(&file, |command| {
                command.args(["--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0"]).args(AMPLE).args(&options);
                if watch {
                    command.arg("--watch");
                }
            });
            let mut established = stream(&agent, &authority).await;
            assert_eq!(established.ask(get("1", "/")).await.audit.unwrap().tags, ["old"]);

            module::write(directory.path(), "m.wasm", &module::tagging("new"));
            authority.write_certificate(&renewed);
            if !watch {
                agent.signal(Signal::HUP);
            }
            wait_for("the new module", || (tag(&mut agent.connect()) == "new").then_some(()));
            assert_eq!(established.ask(get("2", "/")).await.audit.unwrap().tags, ["new"]);
            authority.connect(&agent, None).await.unwrap_err();
            assert_eq!(stream(&agent, &renewed).await.ask(get("3", "/")).await.audit.unwrap().tags, ["new"]);
            agent.end();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn and_everything_else_reload_under_load_without_loss() {
        const RELOADS: usize = 20;
        let authority = Authority::new();
        let files = Files::new();
        let options = authority.options();
        let config = format!("@{}", files.path("config.json").display());
        let agent = AGENT.start_with(&files.path("m.wasm"), |command| {
            command
                .args(["--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0", "--module-config", &config])
                .args(AMPLE)
                .args(&options);
        });
        let admin = agent.admin();
        let (authority, agent) = (Arc::new(authority), Arc::new(agent));
        let stop = Arc::new(AtomicBool::new(false));
        // One connection that stays, and many new ones.
        let mut stays = stream(&agent, &authority).await;
        let stopped = Arc::clone(&stop);
        let established = tokio::spawn(async move {
            let mut asked = 0;
            while !stopped.load(SeqCst) {
                assert!(is_allow(&stays.ask(get(&format!("stays-{asked}"), "/")).await));
                asked += 1;
            }
            asked
        });
        let (stopped, to, root) = (Arc::clone(&stop), Arc::clone(&agent), Arc::clone(&authority));
        let fresh = tokio::spawn(async move {
            let mut asked = 0;
            while !stopped.load(SeqCst) {
                assert!(is_allow(&stream(&to, &root).await.ask(get(&format!("new-{asked}"), "/")).await));
                asked += 1;
            }
            asked
        });
        for number in 1..=RELOADS {
            files.config(&json!({"rules": number}).to_string());
            authority.write_certificate(&authority);
            agent.signal(Signal::HUP);
            admin.wait_for_metric(RELOADED, number as f64);
            assert_eq!(rules(&mut agent.connect()), json!({"rules": number}));
        }
        stop.store(true, SeqCst);
        assert!(established.await.unwrap() > RELOADS);
        assert!(fresh.await.unwrap() > 1);
        assert_eq!(admin.metric(NOT_RELOADED), 0.0);
    }
}
