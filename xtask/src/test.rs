//! `cargo xtask test`: runs all tests and counts them.

use crate::tools::{announce, show};
use crate::{cargo, peers, tools};
use anyhow::{Context, Result, bail};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Leave out `cargo xtask guests` and `cargo xtask e2e`: the guests in other languages and the
    /// real proxy, which take long to build and to run
    #[arg(long)]
    quick: bool,
}

/// Enough calls to reveal a leak, and few enough for a test.
const GUEST_CALLS: &str = "20000";

/// Numbers of tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct TestCount {
    passed: u64,
    failed: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut steps = Vec::new();
    let mut workspace = cargo::command();
    workspace.args(["test", "--locked", "--workspace", "--no-fail-fast"]);
    steps.push(("the workspace", workspace));
    steps.push(("every interleaving of the circuit breaker", loom()));
    for manifest in cargo::nested_workspaces(&["sdk", "examples", "fixtures"])? {
        let mut nested = cargo::command();
        nested
            .args(["test", "--locked", "--workspace", "--no-fail-fast", "--manifest-path"])
            .arg(manifest)
            // All of them share one folder, so their dependencies are compiled once.
            .env("CARGO_TARGET_DIR", tools::root().join("target/nested"));
        steps.push(("a nested workspace", nested));
    }
    steps.push(("the proxy's published client", ourselves(&["peers"])?));
    if !args.quick {
        steps.push(("guests in every language", ourselves(&["guests", "--calls", GUEST_CALLS])?));
        steps.push(("the real proxy", ourselves(&["e2e"])?));
    }

    let mut total = TestCount::default();
    let mut broken = Vec::new();
    for (name, mut command) in steps {
        announce(&format!("{name}: {}", show(&command)));
        let (count, succeeded) = run_and_count(&mut command)?;
        total.passed += count.passed;
        total.failed += count.failed;
        if !succeeded {
            broken.push(show(&command));
            // A step that fails before it runs a test counts as one failure.
            total.failed += u64::from(count.failed == 0);
        }
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if !broken.is_empty() {
        bail!("failed: {}", broken.join(", "));
    }
    Ok(())
}

/// Tests the built agent and the product page's two modules with the published client.
pub(crate) fn published_client() -> Result<()> {
    let agent = cargo::agent(false)?;
    let security = cargo::guest("examples/rust/security")?;
    let bot_protection = cargo::guest("examples/rust/bot-protection")?;
    peers::test_published_client(&agent, &security, &bot_protection)
}

/// The tests that loom runs in every interleaving of their threads.
fn loom() -> Command {
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let mut loom = cargo::command();
    loom.args(["test", "--locked", "--package", "zentinel-wasm-breaker", "--lib"])
        .env("RUSTFLAGS", format!("{flags} --cfg loom"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // Other flags would rebuild all of the workspace each time.
        .env("CARGO_TARGET_DIR", tools::root().join("target/loom"));
    loom
}

/// Another task of this program.
fn ourselves(arguments: &[&str]) -> Result<Command> {
    let program = std::env::current_exe().context("cannot find the path of this program")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(tools::root());
    Ok(command)
}

/// Runs a command, forwards its output, and counts the tests reported there.
fn run_and_count(command: &mut Command) -> Result<(TestCount, bool)> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {}", show(command)))?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut lines = Vec::new();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let mut out = std::io::stdout().lock();
        out.write_all(&line)?;
        out.write_all(b"\n")?;
        lines.push(String::from_utf8_lossy(&line).into_owned());
    }
    Ok((count(&lines), child.wait()?.success()))
}

/// The sum of the results in the output of test runners. A line `N passed, M failed` is a total,
/// and replaces the sum.
fn count(lines: &[String]) -> TestCount {
    if let Some(count) = lines.iter().rev().find_map(|line| plain(line)) {
        return count;
    }
    let mut total = TestCount::default();
    for line in lines {
        if let Some(rest) = line.strip_prefix("test result: ") {
            total.passed += number_before(rest, " passed").unwrap_or(0);
            total.failed += number_before(rest, " failed").unwrap_or(0);
        }
    }
    total
}

fn plain(line: &str) -> Option<TestCount> {
    let (passed, failed) = line.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some(TestCount { passed: passed.parse().ok()?, failed: failed.parse().ok()? })
}

fn number_before(text: &str, word: &str) -> Option<u64> {
    let before = &text[..text.find(word)?];
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(text: &str) -> (u64, u64) {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let TestCount { passed, failed } = count(&lines);
        (passed, failed)
    }

    #[test]
    fn sums_the_results_of_cargo_test() {
        let text = "test a ... ok\n\
            test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(counted(text), (4, 2));
    }

    #[test]
    fn prefers_a_total() {
        let text = "test result: ok. 3 passed; 0 failed; 0 ignored\n12 passed, 1 failed\n";
        assert_eq!(counted(text), (12, 1));
        assert_eq!(counted("nothing ran\n"), (0, 0));
    }
}
