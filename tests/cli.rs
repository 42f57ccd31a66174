//! The command line: what it takes, from where, and how it refuses.

mod common;

use common::{Agent, module};

#[test]
fn it_serves_a_module_and_ends_in_order() {
    let modules = tempfile::tempdir().unwrap();
    let agent = Agent::start(&module::write(modules.path(), "m.wasm", &module::echo(&module::PAGE_HOOKS)), &[]);
    let answer = agent.connect().get("a", "/x?\"q\\");
    assert_eq!(module::seen(&answer)["uri"], "/x?\"q\\");
    agent.end();
}
