//! Restarts and upgrades under load, which no client notices.

use zentinel_wasm_e2e::Paths;
use zentinel_wasm_e2e::restarts::{Change, Restarts};
use zentinel_wasm_e2e::sample::Files;

/// The short form of `cargo xtask restart`.
#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn fail_no_request() {
    let Paths { agent, proxy, security, .. } = Paths::from_env();
    let mut stack = Restarts::start(&Files { agent, proxy, module: security }).expect("cannot start the stack");
    let changes = [Change::Restart, Change::Upgrade, Change::Restart, Change::Restart, Change::Upgrade, Change::Restart, Change::Restart];
    let report = stack.run(500, &changes);
    assert!(report.requests() > 1000, "{} requests", report.requests());
    let during = |change| report.samples(Some(change)).len();
    assert!(during(Change::Restart) > 0 && during(Change::Upgrade) > 0);
    assert_eq!(report.failed(), 0, "of {} requests", report.requests());
}
