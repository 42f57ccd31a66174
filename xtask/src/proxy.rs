//! The real proxy: finding it, and building it from crates.io when it is missing.

use crate::tools::{cache, install_debian, on_path, output, run, say};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The proxy that the agent is made for.
pub(crate) const DEFAULT_VERSION: &str = "0.6.54";

/// The first rustc that compiles proxies from 0.6.46 on.
const RUSTC_MINOR: u32 = 96;

/// Debian's names for what the build needs beside a compiler of Rust.
const BUILD_TOOLS: [(&str, &str); 3] = [("protoc", "protobuf-compiler"), ("cmake", "cmake"), ("clang", "clang")];

/// The proxy of this version in the cache, else a `zentinel` on PATH that says it is that version.
pub(crate) fn find(version: &str) -> Result<Option<PathBuf>> {
    let cached = cached(version)?;
    if cached.is_file() {
        return Ok(Some(cached));
    }
    let Some(installed) = on_path("zentinel") else {
        return Ok(None);
    };
    let told = output(Command::new(&installed).arg("--version"))?;
    Ok(told.contains(version).then_some(installed))
}

fn cached(version: &str) -> Result<PathBuf> {
    Ok(cache()?.join("proxy").join(version).join("zentinel"))
}

/// Finds the proxy or builds it, which takes about 25 minutes on two cores, once.
pub(crate) fn find_or_build(version: &str) -> Result<PathBuf> {
    if let Some(found) = find(version)? {
        return Ok(found);
    }
    let tools = Toolchain::find(version)?;
    let home = cache()?.join("proxy");
    let staging = home.join(format!("{version}.building"));
    say(&format!("building zentinel-proxy {version} from crates.io (about 25 minutes on two cores, once)"));
    let mut build = Command::new(&tools.cargo);
    build
        .args(["install", "zentinel-proxy", "--version", version, "--root"])
        .arg(&staging)
        .env("RUSTC", &tools.rustc)
        // Its own home keeps another cargo's registry format out of the user's.
        .env("CARGO_HOME", home.join("cargo-home"))
        .env("CARGO_TARGET_DIR", staging.join("target"))
        // What is tested is the proxy's behaviour, not its speed: without optimisation across
        // crates it builds in half the time.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    // What the cargo that runs us set for itself is not meant for another one.
    for name in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTDOC"] {
        build.env_remove(name);
    }
    if tools.locked {
        build.arg("--locked");
    }
    run(&mut build)?;
    let binary = cached(version)?;
    let dir = binary.parent().expect("the path has a folder");
    std::fs::create_dir_all(dir)?;
    std::fs::rename(staging.join("bin/zentinel"), &binary).with_context(|| format!("moving the proxy to {}", binary.display()))?;
    std::fs::remove_dir_all(&staging)?;
    Ok(binary)
}

/// What compiles a proxy.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    /// The published lock file of 0.6.45 still resolves; those of later versions do not.
    locked: bool,
}

impl Toolchain {
    fn find(version: &str) -> Result<Self> {
        let old = version == "0.6.45";
        let missing: Vec<&str> =
            BUILD_TOOLS.iter().filter(|(program, _)| on_path(program).is_none()).map(|(_, package)| *package).collect();
        install_debian(&format!("tools to build zentinel-proxy {version} are missing"), &missing)?;
        let ours = Self {
            cargo: on_path("cargo").context("there is no `cargo` on PATH")?,
            rustc: on_path("rustc").context("there is no `rustc` on PATH")?,
            locked: old,
        };
        if old || minor(&ours.rustc)? >= RUSTC_MINOR {
            return Ok(ours);
        }
        // Debian ships a newer compiler beside its stable one, for browsers.
        let debian = Self { cargo: "/usr/bin/cargo".into(), rustc: "/usr/bin/rustc".into(), locked: false };
        if !new_enough(&debian.rustc) {
            install_debian(&format!("zentinel-proxy {version} needs rustc 1.{RUSTC_MINOR}"), &["rustc-web", "cargo-web"])?;
        }
        if !new_enough(&debian.rustc) {
            bail!(
                "zentinel-proxy {version} needs rustc 1.{RUSTC_MINOR}: `rustup update stable`, \
                 or put a `zentinel` {version} on PATH"
            );
        }
        Ok(debian)
    }
}

fn new_enough(rustc: &Path) -> bool {
    rustc.is_file() && minor(rustc).is_ok_and(|minor| minor >= RUSTC_MINOR)
}

/// 95 for `rustc 1.95.0 (…)`.
fn minor(rustc: &Path) -> Result<u32> {
    let told = output(Command::new(rustc).arg("--version").env_remove("RUSTUP_TOOLCHAIN"))?;
    told.split('.').nth(1).and_then(|minor| minor.parse().ok()).with_context(|| format!("cannot read the version in {told:?}"))
}
