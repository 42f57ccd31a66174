//! Finds the real proxy, or builds it from crates.io.

use crate::tools::{announce, cache, install_debian, on_path, output, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The proxy version that the agent is made for.
pub(crate) const DEFAULT_VERSION: &str = "0.6.54";

/// The minor version of the first rustc that compiles proxies from 0.6.46.
const RUSTC_MINOR: u32 = 96;

/// Programs that the build needs besides Rust, with the Debian packages that contain them.
const BUILD_TOOLS: [(&str, &str); 3] = [("protoc", "protobuf-compiler"), ("cmake", "cmake"), ("clang", "clang")];

/// The proxy of this version from the cache, or else `zentinel` on PATH if it has this version.
pub(crate) fn find(version: &str) -> Result<Option<PathBuf>> {
    let cached = cached(version)?;
    if cached.is_file() {
        return Ok(Some(cached));
    }
    let Some(installed) = on_path("zentinel") else {
        return Ok(None);
    };
    let printed = output(Command::new(&installed).arg("--version"))?;
    Ok(printed.contains(version).then_some(installed))
}

fn cached(version: &str) -> Result<PathBuf> {
    Ok(cache()?.join("proxy").join(version).join("zentinel"))
}

/// Finds the proxy or builds it. A build takes about 25 minutes on two cores and is cached.
pub(crate) fn find_or_build(version: &str) -> Result<PathBuf> {
    if let Some(found) = find(version)? {
        return Ok(found);
    }
    let tools = Toolchain::find(version)?;
    let home = cache()?.join("proxy");
    let staging = home.join(format!("{version}.building"));
    announce(&format!("building zentinel-proxy {version} from crates.io (takes about 25 minutes on two cores, once)"));
    let mut build = Command::new(&tools.cargo);
    build
        .args(["install", "zentinel-proxy", "--version", version, "--root"])
        .arg(&staging)
        .env("RUSTC", &tools.rustc)
        // A separate home, because another cargo version may use another format for its registry.
        .env("CARGO_HOME", home.join("cargo-home"))
        .env("CARGO_TARGET_DIR", staging.join("target"))
        // The tests check the proxy's behaviour and not its speed. These settings halve the build
        // time.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    // The cargo that runs this program sets these for itself; they do not apply to another one.
    for name in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTDOC"] {
        build.env_remove(name);
    }
    if tools.locked {
        build.arg("--locked");
    }
    run(&mut build)?;
    let binary = cached(version)?;
    let dir = binary.parent().expect("the path has a parent");
    std::fs::create_dir_all(dir)?;
    std::fs::rename(staging.join("bin/zentinel"), &binary).with_context(|| format!("moving the proxy to {}", binary.display()))?;
    std::fs::remove_dir_all(&staging)?;
    Ok(binary)
}

/// The toolchain for building a proxy.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    /// Only the published lock file of 0.6.45 still resolves.
    locked: bool,
}

impl Toolchain {
    fn find(version: &str) -> Result<Self> {
        let old = version == "0.6.45";
        let missing: Vec<&str> =
            BUILD_TOOLS.iter().filter(|(program, _)| on_path(program).is_none()).map(|(_, package)| *package).collect();
        install_debian(&format!("cannot build zentinel-proxy {version}: tools are missing"), &missing)?;
        let ours = Self {
            cargo: on_path("cargo").context("cannot find `cargo` on PATH")?,
            rustc: on_path("rustc").context("cannot find `rustc` on PATH")?,
            locked: old,
        };
        if old || minor(&ours.rustc)? >= RUSTC_MINOR {
            return Ok(ours);
        }
        // Debian has a newer compiler for building browsers, besides its default one.
        let debian = Self { cargo: "/usr/bin/cargo".into(), rustc: "/usr/bin/rustc".into(), locked: false };
        if !new_enough(&debian.rustc) {
            install_debian(&format!("zentinel-proxy {version} needs rustc 1.{RUSTC_MINOR}"), &["rustc-web", "cargo-web"])?;
        }
        if !new_enough(&debian.rustc) {
            bail!(
                "zentinel-proxy {version} needs rustc 1.{RUSTC_MINOR}: run `rustup update stable`, \
                 or put `zentinel` {version} on PATH"
            );
        }
        Ok(debian)
    }
}

fn new_enough(rustc: &Path) -> bool {
    rustc.is_file() && minor(rustc).is_ok_and(|minor| minor >= RUSTC_MINOR)
}

/// The minor version of a rustc: 95 for `rustc 1.95.0 (…)`.
fn minor(rustc: &Path) -> Result<u32> {
    let printed = output(Command::new(rustc).arg("--version").env_remove("RUSTUP_TOOLCHAIN"))?;
    printed.split('.').nth(1).and_then(|minor| minor.parse().ok()).with_context(|| format!("cannot find the version in {printed:?}"))
}
