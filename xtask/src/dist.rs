//! `cargo xtask dist`: the release archive, as `zentinel bundle install wasm` looks for it.

use crate::cargo;
use crate::tools::{output, root, run, say};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The binary, by which the installer finds it in the archive: nothing else there may bear this name.
const BINARY: &str = "zentinel-wasm-agent";

/// What goes into the archive beside the binary, the man page and the completions.
const FILES: [&str; 3] = ["LICENSE", "README.md", "CHANGELOG.md"];

/// Folders of samples that go into the archive.
const SAMPLES: [&str; 4] = ["deploy/grafana", "deploy/kdl", "deploy/prometheus", "deploy/systemd"];

pub(crate) fn run_dist() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let name = archive_name(version, std::env::consts::OS, std::env::consts::ARCH);
    let dist = root().join("target/dist");
    let stage = dist.join(&name);
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    fs::create_dir_all(&stage)?;

    say("building the agent for release");
    let binary = binary()?;
    fs::copy(&binary, stage.join(BINARY)).with_context(|| format!("copying {}", binary.display()))?;
    say("writing the man page and the completions");
    let mut manual = cargo::command();
    run(manual.args(["run", "--locked", "--quiet", "--example", "manual", "--"]).arg(&stage))?;
    for file in FILES {
        fs::copy(root().join(file), stage.join(file)).with_context(|| format!("copying {file}"))?;
    }
    for folder in SAMPLES {
        copy_folder(&root().join(folder), &stage.join(folder))?;
    }

    check_version(&stage.join(BINARY), version)?;
    let archive = pack(&stage, &dist)?;
    let sum = checksum(&archive)?;
    println!("{}", archive.display());
    println!("{}", sum.display());
    Ok(())
}

/// The name that the proxy's installer asks for, without its ending. It names processors as Rust does.
fn archive_name(version: &str, os: &str, arch: &str) -> String {
    format!("{BINARY}-{version}-{os}-{arch}")
}

/// Builds the agent for release. With glibc it is linked statically, so that it runs on every distribution and in an empty container.
fn binary() -> Result<PathBuf> {
    let host = host()?;
    let mut build = cargo::command();
    build.args(["build", "--locked", "--release", "--bin", BINARY, "--target", &host]);
    if host.ends_with("-linux-gnu") {
        build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    run(&mut build)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(host).join("release").join(BINARY))
}

/// The target that rustc compiles for when nobody tells it.
fn host() -> Result<String> {
    let told = output(Command::new("rustc").arg("-vV"))?;
    match told.lines().find_map(|line| line.strip_prefix("host: ")) {
        Some(host) => Ok(host.to_owned()),
        None => bail!("rustc does not say what it compiles for"),
    }
}

/// Asks the binary what the installer asks it.
fn check_version(binary: &Path, version: &str) -> Result<()> {
    let told = output(Command::new(binary).arg("--version"))?;
    if told.trim() != format!("{BINARY} {version}") {
        bail!("`{}` says that it is {:?}, not {BINARY} {version}", binary.display(), told.trim());
    }
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Packs what lies in `stage` into an archive beside it; the same content gives the same bytes.
fn pack(stage: &Path, dist: &Path) -> Result<PathBuf> {
    let name = stage.file_name().context("the stage has a name")?;
    let mut archive = dist.join(name).into_os_string();
    archive.push(".tar");
    let tar = PathBuf::from(&archive);
    archive.push(".gz");
    let archive = PathBuf::from(archive);
    // The time of the release, not of the build.
    let time = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(time) => time,
        Err(_) => output(Command::new("git").current_dir(root()).args(["log", "-1", "--format=%ct"])).unwrap_or_else(|_| "0".into()),
    };
    run(Command::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=u+rw,go+r-w", "--format=ustar"])
        .arg(format!("--mtime=@{}", time.trim()))
        .arg("--create")
        .arg("--file")
        .arg(&tar)
        .arg("--directory")
        .arg(stage)
        .arg("."))?;
    run(Command::new("gzip").args(["--force", "--no-name", "-9"]).arg(&tar))?;
    Ok(archive)
}

/// Writes the archive's SHA-256 beside it, as `sha256sum --check` and the installer read it.
fn checksum(archive: &Path) -> Result<PathBuf> {
    let name = archive.file_name().context("the archive has a name")?;
    let folder = archive.parent().context("the archive lies in a folder")?;
    let sum = output(Command::new("sha256sum").current_dir(folder).arg(name))?;
    let mut file = archive.as_os_str().to_owned();
    file.push(".sha256");
    let file = PathBuf::from(file);
    fs::write(&file, sum).with_context(|| format!("writing {}", file.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_called_as_the_installer_asks_for_it() {
        assert_eq!(archive_name("0.5.0", "linux", "x86_64"), "zentinel-wasm-agent-0.5.0-linux-x86_64");
        assert_eq!(archive_name("0.5.0", "linux", "aarch64"), "zentinel-wasm-agent-0.5.0-linux-aarch64");
    }

    #[test]
    fn the_binary_lies_at_the_top_and_the_sum_fits() {
        let dist = tempfile::tempdir().unwrap();
        let stage = dist.path().join(archive_name("1.2.3", "linux", "x86_64"));
        fs::create_dir_all(stage.join("completions")).unwrap();
        fs::write(stage.join(BINARY), "binary").unwrap();
        fs::write(stage.join("completions/x.bash"), "complete").unwrap();

        let archive = pack(&stage, dist.path()).unwrap();
        assert_eq!(archive, dist.path().join("zentinel-wasm-agent-1.2.3-linux-x86_64.tar.gz"));
        let first = fs::read(&archive).unwrap();
        assert_eq!(fs::read(pack(&stage, dist.path()).unwrap()).unwrap(), first, "the same content gives the same bytes");

        let listed = output(Command::new("tar").arg("--list").arg("--file").arg(&archive)).unwrap();
        let named: Vec<_> = listed.lines().filter(|line| line.rsplit('/').next() == Some(BINARY)).collect();
        assert_eq!(named, ["./zentinel-wasm-agent"]);

        checksum(&archive).unwrap();
        run(Command::new("sha256sum").current_dir(dist.path()).args([
            "--check",
            "--quiet",
            "zentinel-wasm-agent-1.2.3-linux-x86_64.tar.gz.sha256",
        ]))
        .unwrap();
    }
}
