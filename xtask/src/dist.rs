//! `cargo xtask dist`: builds release archives in the form that `zentinel bundle install wasm`
//! expects.

use crate::cargo;
use crate::target::Target;
use crate::tools::{self, announce, output, root};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The name by which the installer finds the binary, so no other file in the archive may have it.
const BINARY: &str = "zentinel-wasm-agent";

/// Files in the archive besides the binary, the man page and the completions.
const FILES: [&str; 4] = ["LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md"];

/// Folders in the archive: the samples, and the documentation that they refer to.
const FOLDERS: [&str; 7] =
    ["deploy/container", "deploy/grafana", "deploy/kdl", "deploy/kubernetes", "deploy/prometheus", "deploy/systemd", "docs"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build for this target; can be repeated [default: this machine's target]
    #[arg(long = "target", value_enum, value_name = "TARGET")]
    targets: Vec<Target>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let host = [Target::host()?];
    let targets = if args.targets.is_empty() { &host[..] } else { &args.targets };
    for target in targets {
        archive(*target)?;
    }
    Ok(())
}

/// Builds the archive of one target.
fn archive(target: Target) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let dist = root().join("target/dist");
    let stage = dist.join(archive_name(version, target.platform()));
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    fs::create_dir_all(&stage)?;

    announce(&format!("building the agent for {}", target.triple()));
    let binary = build(target)?;
    fs::copy(&binary, stage.join(BINARY)).with_context(|| format!("copying {}", binary.display()))?;
    announce("writing the man page and the completions");
    let mut manual = cargo::command();
    tools::run(manual.args(["run", "--locked", "--quiet", "--example", "manual", "--"]).arg(&stage))?;
    for file in FILES {
        fs::copy(root().join(file), stage.join(file)).with_context(|| format!("copying {file}"))?;
    }
    for folder in FOLDERS {
        copy_folder(&root().join(folder), &stage.join(folder))?;
    }

    let scratch = tempfile::tempdir()?;
    match target.runner(&stage.join(BINARY), scratch.path())? {
        Some(program) => check_version(&program, version)?,
        None => announce(&target.cannot_run()),
    }
    let archive = pack(&stage, &dist)?;
    let sum = checksum(&archive)?;
    println!("{}", archive.display());
    println!("{}", sum.display());
    Ok(())
}

/// The file name that the proxy's installer requests, without the extension.
fn archive_name(version: &str, platform: &str) -> String {
    format!("{BINARY}-{version}-{platform}")
}

/// Builds the agent for release. With glibc it is linked statically, so it runs on every
/// distribution and in an empty container.
pub(crate) fn build(target: Target) -> Result<PathBuf> {
    let mut build = target.cargo("build")?;
    build.args(["--locked", "--release", "--bin", BINARY]);
    if target.triple().ends_with("-linux-gnu") {
        build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    tools::run(&mut build)?;
    let folder = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(folder.join(target.triple()).join("release").join(BINARY))
}

/// Checks the output of `--version`, as the installer does.
fn check_version(binary: &Path, version: &str) -> Result<()> {
    let printed = output(Command::new(binary).arg("--version"))?;
    if printed.trim() != format!("{BINARY} {version}") {
        bail!("`{} --version` printed {:?}, expected {BINARY} {version}", binary.display(), printed.trim());
    }
    Ok(())
}

/// Copies a folder with its subfolders.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        let to = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_folder(&path, &to)?;
        } else {
            fs::copy(&path, to)?;
        }
    }
    Ok(())
}

/// Packs the folder `stage` into an archive in `dist`. The same content gives the same bytes.
fn pack(stage: &Path, dist: &Path) -> Result<PathBuf> {
    let name = stage.file_name().context("the stage has no name")?;
    let mut archive = dist.join(name).into_os_string();
    archive.push(".tar");
    let tar = PathBuf::from(&archive);
    archive.push(".gz");
    let archive = PathBuf::from(archive);
    // The time of the release and not of the build, because builds must be reproducible.
    let time = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(time) => time,
        Err(_) => output(Command::new("git").current_dir(root()).args(["log", "-1", "--format=%ct"])).unwrap_or_else(|_| "0".into()),
    };
    tools::run(
        Command::new("tar")
            .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=u+rw,go+r-w", "--format=ustar"])
            .arg(format!("--mtime=@{}", time.trim()))
            .arg("--create")
            .arg("--file")
            .arg(&tar)
            .arg("--directory")
            .arg(stage)
            .arg("."),
    )?;
    tools::run(Command::new("gzip").args(["--force", "--no-name", "-9"]).arg(&tar))?;
    Ok(archive)
}

/// Writes the archive's SHA-256 to a file beside it, in the format of `sha256sum --check` and the
/// installer.
fn checksum(archive: &Path) -> Result<PathBuf> {
    let name = archive.file_name().context("the archive has no name")?;
    let folder = archive.parent().context("the archive has no folder")?;
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
    fn archives_have_the_installer_s_names() {
        let names = Target::ALL.map(|target| archive_name("0.5.0", target.platform()));
        assert_eq!(
            names,
            [
                "zentinel-wasm-agent-0.5.0-linux-x86_64",
                "zentinel-wasm-agent-0.5.0-linux-aarch64",
                "zentinel-wasm-agent-0.5.0-darwin-aarch64",
            ]
        );
    }

    #[test]
    fn archives_contain_all_samples_and_the_documentation() {
        let entries = fs::read_dir(root().join("deploy")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // The manual is in the archive as it is generated, and not as its generator.
        let mut folders: Vec<_> = entries.filter(|name| name != "manual").map(|name| format!("deploy/{name}")).collect();
        folders.sort();
        folders.push("docs".into());
        assert_eq!(folders, FOLDERS);

        let stage = tempfile::tempdir().unwrap();
        copy_folder(&root().join("deploy/systemd"), stage.path()).unwrap();
        assert!(stage.path().join("sysusers.d/zentinel-wasm-agent.conf").is_file());
    }

    #[test]
    fn archives_are_reproducible_and_match_their_checksum() {
        let dist = tempfile::tempdir().unwrap();
        let stage = dist.path().join(archive_name("1.2.3", Target::LinuxX86_64.platform()));
        fs::create_dir_all(stage.join("completions")).unwrap();
        fs::write(stage.join(BINARY), "binary").unwrap();
        fs::write(stage.join("completions/x.bash"), "complete").unwrap();

        let archive = pack(&stage, dist.path()).unwrap();
        assert_eq!(archive, dist.path().join("zentinel-wasm-agent-1.2.3-linux-x86_64.tar.gz"));
        let first = fs::read(&archive).unwrap();
        assert_eq!(fs::read(pack(&stage, dist.path()).unwrap()).unwrap(), first, "the same content must give the same bytes");

        let listed = output(Command::new("tar").arg("--list").arg("--file").arg(&archive)).unwrap();
        let named: Vec<_> = listed.lines().filter(|line| line.rsplit('/').next() == Some(BINARY)).collect();
        assert_eq!(named, ["./zentinel-wasm-agent"]);

        checksum(&archive).unwrap();
        tools::run(Command::new("sha256sum").current_dir(dist.path()).args([
            "--check",
            "--quiet",
            "zentinel-wasm-agent-1.2.3-linux-x86_64.tar.gz.sha256",
        ]))
        .unwrap();
    }
}
