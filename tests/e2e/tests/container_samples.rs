//! The Dockerfile, the compose file and the Kubernetes manifests: valid, and their commands serve a
//! request behind the real proxy. No container is started.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use zentinel_wasm_e2e::http::exchange;
use zentinel_wasm_e2e::sample::{self, adapt, patient, without_metrics};
use zentinel_wasm_e2e::upstream::Upstream;
use zentinel_wasm_e2e::{Agent, Paths, Proxy, free_port, wait};

/// The oldest version with sidecar containers, and the newest one of the schema's package.
const KUBERNETES_VERSIONS: [&str; 2] = ["1.29", "1.37"];

const SOCKETS: &str = "/run/zentinel-agents";
const MODULE: &str = "/modules/wasm.wasm";
const ADMIN: &str = "0.0.0.0:9191";
const GRPC: &str = "0.0.0.0:50051";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A program that `cargo xtask e2e` has installed.
fn tool(variable: &str) -> Command {
    Command::new(std::env::var_os(variable).unwrap_or_else(|| panic!("`{variable}` is not set: run these tests with `cargo xtask e2e`")))
}

/// Runs a command that must succeed, and returns its output.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {printed}{}", String::from_utf8_lossy(&output.stderr));
    printed
}

/// The documents of a YAML file in `deploy/`.
fn documents(name: &str) -> Vec<Value> {
    let script = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let json = run(tool("E2E_PYTHON").args(["-c", script]).arg(sample::path(name)));
    serde_json::from_str(&json).expect("invalid JSON")
}

fn strings(value: &Value) -> Vec<String> {
    let values = value.as_array().unwrap_or_else(|| panic!("not a list: {value}"));
    values.iter().map(|value| value.as_str().unwrap_or_else(|| panic!("not a string: {value}")).to_owned()).collect()
}

/// The pod of the only Deployment.
fn pod(documents: &[Value]) -> &Value {
    let deployment = documents.iter().find(|document| document["kind"] == "Deployment").expect("no Deployment");
    &deployment["spec"]["template"]["spec"]
}

fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let containers = ["initContainers", "containers"].into_iter().filter_map(|list| pod[list].as_array()).flatten();
    containers.into_iter().find(|container| container["name"] == name).unwrap_or_else(|| panic!("no container {name:?}"))
}

/// The agent as the image runs it with `args`: its variables and paths, moved to `dir` and to free
/// ports of the loopback interface.
struct FromImage {
    agent: Agent,
    admin_port: u16,
    grpc_port: Option<u16>,
}

/// `text` of a sample, moved to `dir`.
fn moved_to(dir: &Path, text: &str) -> String {
    text.replace(SOCKETS, &dir.display().to_string())
        .replace(MODULE, &Paths::from_env().mirror.display().to_string())
        .replace("/cache", &dir.join("cache").display().to_string())
}

/// A command of the image, with its variables moved to `dir`.
fn image_command(dir: &Path) -> Command {
    let mut command = Command::new(Paths::from_env().agent);
    command.env_clear().envs(image_variables().into_iter().map(|(name, value)| (name, moved_to(dir, &value))));
    command
}

/// Whether the image's health check succeeds, and what it prints.
fn is_healthy(dir: &Path) -> (bool, String) {
    let output = image_command(dir).args(health_check()).output().expect("cannot run the health check");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&printed).trim_end().to_owned())
}

impl FromImage {
    #[track_caller]
    fn start(args: &[String], dir: &Path) -> Self {
        let (admin_port, grpc_port) = (free_port(), free_port());
        let moved = |text: &str| {
            moved_to(dir, text).replace(ADMIN, &format!("127.0.0.1:{admin_port}")).replace(GRPC, &format!("127.0.0.1:{grpc_port}"))
        };
        let grpc_port = args.iter().any(|arg| arg.contains(GRPC)).then_some(grpc_port);
        assert!(args.iter().any(|arg| arg.contains(ADMIN)), "no admin address in {args:?}");
        let mut command = image_command(dir);
        command.args(args.iter().map(|arg| moved(arg)));
        // Other tests on the machine must not cause timeouts.
        command.arg("--timeout-ms=3000");
        let agent = Agent::start_command(&mut command, dir.join("wasm.sock"), grpc_port, dir).expect("cannot start the agent");
        Self { agent, admin_port, grpc_port }
    }

    /// Waits until the admin address answers `path` with 200.
    fn wait_until_200(&self, path: &str) {
        wait::until(&format!("200 for {path}"), || (status(self.admin_port, path) == Some(200)).then_some(()));
    }
}

fn status(port: u16, path: &str) -> Option<u16> {
    let headers = [("Host".to_owned(), "localhost".to_owned())];
    exchange(port, "GET", path, &headers, None).ok().map(|response| response.status())
}

/// Starts the proxy with a configuration that connects to the agent and to a backend on other
/// machines or in other containers.
#[track_caller]
fn start_proxy(text: &str, replacements: &[(&str, String)], upstream: &Upstream, dir: &Path) -> Proxy {
    let port = free_port();
    let mut all = vec![("backend:8081", format!("127.0.0.1:{}", upstream.port()))];
    all.extend_from_slice(replacements);
    let text = patient(&without_metrics(&adapt(text, &all))).replace("0.0.0.0:8080", &format!("127.0.0.1:{port}"));
    assert!(text.contains(&format!("127.0.0.1:{port}")), "the proxy does not listen on port 8080: {text}");
    Proxy::start_with(&Paths::from_env().proxy, port, &text, dir).expect("cannot start the proxy")
}

#[track_caller]
fn assert_serves(proxy: &Proxy, path: &str) {
    wait::until(&format!("200 for {path}"), || (status(proxy.port(), path) == Some(200)).then_some(()));
}

/// Asserts that `zentinel test --strict` accepts the configuration.
#[track_caller]
fn assert_strict(text: &str) {
    let dir = TempDir::new().expect("cannot create a directory");
    let file = dir.path().join("zentinel.kdl");
    std::fs::write(&file, text.replace(SOCKETS, &dir.path().display().to_string())).expect("cannot write the configuration");
    run(Command::new(Paths::from_env().proxy).args(["test", "--strict", "-c"]).arg(&file));
}

mod image {
    use super::*;

    /// The instructions, with continued lines joined.
    pub(super) fn instructions() -> Vec<String> {
        let text = std::fs::read_to_string(root().join("Dockerfile")).expect("cannot read the Dockerfile");
        let joined = text.replace("\\\n", " ");
        joined.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    /// `docker build` needs every member of the workspace, because cargo reads their manifests.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn contains_the_whole_workspace() {
        let dir = TempDir::new().expect("cannot create a directory");
        for line in instructions() {
            let Some(paths) = line.strip_prefix("COPY ").filter(|paths| !paths.starts_with("--")) else { continue };
            let paths: Vec<&str> = paths.split(' ').collect();
            let (to, from) = paths.split_last().expect("COPY has a destination");
            for path in from {
                // A file into the directory `./`, or a folder to another one.
                let to = if *to == "./" { dir.path().join(path) } else { dir.path().join(to) };
                std::fs::create_dir_all(to.parent().expect("a path has a parent")).expect("cannot create a directory");
                std::os::unix::fs::symlink(root().join(path).canonicalize().expect("COPY of a missing file"), to).expect("cannot link");
            }
        }
        run(Command::new("cargo").args(["metadata", "--locked", "--offline", "--no-deps", "--format-version=1"]).current_dir(dir.path()));
    }
}

/// The command of the image's health check, without its program.
fn health_check() -> Vec<String> {
    let lines = image::instructions();
    let check = lines.iter().find_map(|line| line.strip_prefix("HEALTHCHECK ")?.split_once("CMD ")).expect("no HEALTHCHECK").1;
    let words: Vec<String> = serde_json::from_str(check).expect("not a list of words");
    let entrypoint = lines.iter().find_map(|line| line.strip_prefix("ENTRYPOINT ")).expect("no ENTRYPOINT");
    let [program]: [String; 1] = serde_json::from_str(entrypoint).expect("not one word");
    assert_eq!(words[0], program, "the health check runs another program than the image");
    words[1..].to_vec()
}

/// The variables that the image sets.
fn image_variables() -> Vec<(String, String)> {
    let lines = image::instructions();
    let variables = lines.iter().filter_map(|line| line.strip_prefix("ENV ")).flat_map(|line| line.split(' '));
    let pairs = variables.map(|pair| pair.split_once('=').unwrap_or_else(|| panic!("no value: {pair}")));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

mod kubernetes {
    use super::*;

    const MANIFESTS: [&str; 2] = ["kubernetes/sidecar.yaml", "kubernetes/grpc.yaml"];

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn accepts_the_manifests() {
        let files: Vec<PathBuf> = MANIFESTS.map(sample::path).to_vec();
        let found = std::fs::read_dir(sample::path("kubernetes")).expect("cannot read the directory").count();
        assert_eq!(found, files.len(), "a manifest is not checked");
        for version in KUBERNETES_VERSIONS {
            let script = "import sys, kubernetes_validate.__main__ as m; sys.exit(m.main())";
            run(tool("E2E_PYTHON").args(["-c", script, "--strict", "--quiet", "--kubernetes-version", version]).args(&files));
        }
    }

    /// Every volume that a container mounts exists, every port that a probe or a Service names is
    /// declared, and the NetworkPolicy admits each declared port.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn names_what_exists() {
        for manifest in MANIFESTS {
            let documents = documents(manifest);
            let pod = pod(&documents);
            let names = |list: &Value| -> Vec<String> {
                list.as_array().into_iter().flatten().filter_map(|item| item["name"].as_str()).map(str::to_owned).collect()
            };
            let volumes = names(&pod["volumes"]);
            let containers: Vec<&Value> =
                ["initContainers", "containers"].into_iter().filter_map(|list| pod[list].as_array()).flatten().collect();
            let (mut ports, mut numbers) = (Vec::new(), Vec::new());
            for container in &containers {
                for mount in names(&container["volumeMounts"]) {
                    assert!(volumes.contains(&mount), "{manifest}: no volume {mount:?}");
                }
                let own = names(&container["ports"]);
                for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                    if let Some(port) = container[probe]["httpGet"]["port"].as_str() {
                        assert!(own.iter().any(|name| name == port), "{manifest}: {probe} of no port");
                    }
                }
                ports.extend(own);
                numbers.extend(container["ports"].as_array().into_iter().flatten().map(|port| port["containerPort"].clone()));
            }
            let of_kind = |kind: &str| documents.iter().filter(|document| document["kind"] == kind).collect::<Vec<_>>();
            for service in of_kind("Service") {
                for port in service["spec"]["ports"].as_array().expect("no ports") {
                    let target = port["targetPort"].as_str().expect("not a name");
                    assert!(ports.iter().any(|name| name == target), "{manifest}: a Service for no port");
                }
            }
            let rules = of_kind("NetworkPolicy")[0]["spec"]["ingress"].as_array().expect("no rules");
            let admitted: Vec<Value> =
                rules.iter().filter_map(|rule| rule["ports"].as_array()).flatten().map(|port| port["port"].clone()).collect();
            for number in numbers {
                assert!(admitted.contains(&number), "{manifest}: port {number} is not admitted");
            }
        }
    }

    /// Calls the probes of the agent's container that are HTTP requests.
    fn probe(container: &Value, agent: &FromImage) {
        let probes = ["startupProbe", "livenessProbe", "readinessProbe"].map(|name| &container[name]["httpGet"]["path"]);
        let paths: Vec<&str> = probes.into_iter().filter_map(Value::as_str).collect();
        assert!(paths.len() >= 2, "too few probes: {container}");
        for path in paths {
            agent.wait_until_200(path);
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn serves_a_request_with_the_sidecar() {
        let documents = documents("kubernetes/sidecar.yaml");
        let container = container(pod(&documents), "agent");
        let dir = TempDir::new().expect("cannot create a directory");
        let agent = FromImage::start(&strings(&container["args"]), dir.path());
        probe(container, &agent);

        let config = documents.iter().find_map(|document| document["data"]["config.kdl"].as_str()).expect("no configuration");
        assert_strict(config);
        let upstream = Upstream::start().expect("cannot start the upstream");
        let socket = (format!("{SOCKETS}/wasm.sock"), agent.agent.socket().display().to_string());
        let proxy = start_proxy(config, &[(&socket.0, socket.1)], &upstream, dir.path());
        assert_serves(&proxy, "/");
        let health = &super::container(pod(&documents), "proxy")["readinessProbe"]["httpGet"]["path"];
        assert_serves(&proxy, health.as_str().expect("no readiness probe"));
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn serves_a_request_over_grpc() {
        let documents = documents("kubernetes/grpc.yaml");
        let container = container(pod(&documents), "agent");
        let dir = TempDir::new().expect("cannot create a directory");
        let agent = FromImage::start(&strings(&container["args"]), dir.path());
        probe(container, &agent);
        assert_eq!(container["readinessProbe"]["grpc"]["port"], 50051);

        // The manifest names the address for the sample.
        let manifest = sample::read("kubernetes/grpc.yaml");
        let address = "http://zentinel-wasm-agent:50051";
        assert!(manifest.contains(address), "the manifest does not name {address}");
        let config = sample::read("kdl/grpc.kdl").replace("127.0.0.1:8080", "0.0.0.0:8080").replace("127.0.0.1:8081", "backend:8081");
        let config = adapt(&config, &[("http://127.0.0.1:50051", address.into())]);
        assert_strict(&config);
        let upstream = Upstream::start().expect("cannot start the upstream");
        let grpc_port = agent.grpc_port.expect("the container serves no gRPC");
        let proxy = start_proxy(&config, &[(address, format!("http://127.0.0.1:{grpc_port}"))], &upstream, dir.path());
        assert_serves(&proxy, "/");
    }
}

mod compose {
    use super::*;

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn accepts_the_file() {
        // The linter's only error that is a matter of taste: with both, the built image has a name.
        run(tool("E2E_DCLINT").arg(sample::path("container")).args(["--quiet", "--disable-rule", "no-build-and-image"]));
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn serves_a_request() {
        let documents = documents("container/compose.yml");
        let services = &documents[0]["services"];
        let dir = TempDir::new().expect("cannot create a directory");
        // The proxy starts once the health check of the agent's image succeeds.
        assert_eq!(services["proxy"]["depends_on"]["agent"]["condition"], "service_healthy");
        let (healthy, printed) = is_healthy(dir.path());
        assert!(!healthy && printed.starts_with("not ready: cannot connect to the socket"), "{printed}");
        let agent = FromImage::start(&strings(&services["agent"]["command"]), dir.path());
        wait::until("the agent is healthy", || (is_healthy(dir.path()) == (true, "ready".into())).then_some(()));

        let config = sample::read("container/zentinel.kdl");
        assert_strict(&config);
        let mounted = strings(&services["proxy"]["volumes"]);
        let path = strings(&services["proxy"]["command"]).pop().expect("no configuration");
        assert!(mounted.contains(&format!("./zentinel.kdl:{path}:ro")), "the proxy does not read the configuration: {mounted:?}");
        let upstream = Upstream::start().expect("cannot start the upstream");
        let socket = (format!("{SOCKETS}/wasm.sock"), agent.agent.socket().display().to_string());
        let proxy = start_proxy(&config, &[(&socket.0, socket.1)], &upstream, dir.path());
        assert_serves(&proxy, "/");
    }
}
