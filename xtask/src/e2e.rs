//! `cargo xtask e2e`: tests the agent behind the real proxy.

use crate::{cargo, proxy, tools, validators};
use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The proxy's version
    #[arg(long, value_name = "VERSION", default_value = proxy::DEFAULT_VERSION)]
    #[arg(value_parser = ["0.6.54", "0.6.45"])]
    proxy_version: String,
    /// Run only the tests whose names contain this
    filter: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let version = args.proxy_version.as_str();
    let proxy = proxy::find_or_build(version)?;
    tools::announce("building the agent and the guests");
    let agent = cargo::agent(false)?;
    let mirror = cargo::guest("fixtures/mirror")?;
    let security = cargo::guest("examples/rust/security")?;
    let bot_protection = cargo::guest("examples/rust/bot-protection")?;
    let python = validators::python()?;
    let dclint = validators::dclint()?;
    tools::announce(&format!("end-to-end tests behind zentinel {version}"));
    let mut test = cargo::command();
    test.args(["test", "--locked", "--package", "zentinel-wasm-e2e", "--no-fail-fast"])
        .env("E2E_AGENT", agent)
        .env("E2E_PROXY", proxy)
        .env("E2E_MIRROR", mirror)
        .env("E2E_SECURITY", security)
        .env("E2E_BOT_PROTECTION", bot_protection)
        .env("E2E_PYTHON", python)
        .env("E2E_DCLINT", dclint);
    // The old proxy applies answers differently, so it has its own tests.
    for file in test_files()? {
        if (file == "old_proxy") == (version == "0.6.45") {
            test.args(["--test", &file]);
        }
    }
    test.args(&args.filter).args(["--", "--ignored"]);
    tools::run(&mut test)
}

fn test_files() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(tools::root().join("tests/e2e/tests"))? {
        let path = entry?.path();
        if let (Some(stem), Some("rs")) =
            (path.file_stem().and_then(|stem| stem.to_str()), path.extension().and_then(|extension| extension.to_str()))
        {
            names.push(stem.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
