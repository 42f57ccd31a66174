//! Builds the modules of each language, with the commands in the examples' READMEs.

use super::policy::Policy;
use super::toolchain::{self, Clang};
use crate::pypi::FromPypi;
use crate::tools::{output, root, run};
use crate::{cargo, tools};
use anyhow::{Context, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Language {
    /// The product page's modules
    Rust,
    /// Rust with the SDK
    RustSdk,
    C,
    Cpp,
    Zig,
    Go,
    #[value(name = "assemblyscript")]
    AssemblyScript,
}

impl Language {
    pub(super) const ALL: [Self; 7] = [Self::Rust, Self::RustSdk, Self::C, Self::Cpp, Self::Zig, Self::Go, Self::AssemblyScript];

    /// Whether it implements this policy. The product page has no tour.
    pub(super) fn has(self, policy: &str) -> bool {
        self != Self::Rust || policy != Policy::TOUR
    }

    /// The folder in `examples/`.
    fn folder(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::RustSdk => "rust-sdk",
            Self::C => "c",
            Self::Cpp => "cpp",
            Self::Zig => "zig",
            Self::Go => "go",
            Self::AssemblyScript => "assemblyscript",
        }
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rust => "Rust, the page's",
            Self::RustSdk => "Rust, SDK",
            Self::C => "C",
            Self::Cpp => "C++",
            Self::Zig => "Zig",
            Self::Go => "Go",
            Self::AssemblyScript => "AssemblyScript",
        })
    }
}

/// The modules of a language.
pub(super) struct Guest {
    /// The compiler and its version.
    pub(super) toolchain: String,
    folder: PathBuf,
}

impl Guest {
    pub(super) fn module(&self, policy: &Policy) -> PathBuf {
        self.folder.join(&policy.name).with_extension("wasm")
    }

    pub(super) fn security(&self) -> PathBuf {
        self.folder.join("security.wasm")
    }

    pub(super) fn tour(&self) -> PathBuf {
        self.folder.join(Policy::TOUR).with_extension("wasm")
    }
}

/// The folder names of the policies. Files and crates have underscores instead of hyphens.
const POLICIES: [&str; 3] = ["security", "bot-protection", Policy::TOUR];

fn underscored(policy: &str) -> String {
    policy.replace('-', "_")
}

/// Builds the policies in `language`.
pub(super) fn build(language: Language) -> Result<Guest> {
    let source = root().join("examples").join(language.folder());
    let folder = root().join("target/guests").join(language.folder());
    std::fs::create_dir_all(&folder)?;
    let into = |policy: &str| folder.join(policy).with_extension("wasm");
    let toolchain = match language {
        Language::Rust | Language::RustSdk => {
            for policy in POLICIES.into_iter().filter(|policy| language.has(policy)) {
                let built = cargo::guest(&format!("examples/{}/{policy}", language.folder()))?;
                std::fs::copy(&built, into(policy)).with_context(|| format!("copying {}", built.display()))?;
            }
            let version = output(Command::new("rustc").arg("--version"))?;
            version.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
        }
        Language::C => {
            let clang = Clang::install()?;
            for policy in POLICIES {
                run(Command::new(&clang.c)
                    .args("--target=wasm32 -O2 -Wall -Wextra -Werror -ffreestanding -nostdlib -mbulk-memory".split(' '))
                    .args(["-Wl,--no-entry", "-Wl,--strip-all", "-I", "../../sdk/c", "-o"])
                    .arg(into(policy))
                    .arg(format!("{policy}/{}.c", underscored(policy)))
                    .current_dir(&source))?;
            }
            clang.version()?
        }
        Language::Cpp => {
            let clang = Clang::install()?;
            for policy in POLICIES {
                run(Command::new(&clang.cpp)
                    .args(
                        "--target=wasm32-wasi -std=c++17 -O2 -Wall -Wextra -Werror -fno-exceptions -fno-rtti -mexec-model=reactor"
                            .split(' '),
                    )
                    .args(["-Wl,--strip-all", "-I", "../../sdk/c", "-o"])
                    .arg(into(policy))
                    .arg(format!("{policy}/{}.cpp", underscored(policy)))
                    .current_dir(&source))?;
            }
            clang.version()?
        }
        Language::Zig => zig(&source, into)?,
        Language::Go => go(&source, into)?,
        Language::AssemblyScript => {
            let project = toolchain::assemblyscript()?;
            run(Command::new("npm").args(["run", "--silent", "build"]).current_dir(&project))?;
            for policy in POLICIES {
                std::fs::copy(project.join("build").join(underscored(policy)).with_extension("wasm"), into(policy))?;
            }
            let version = output(Command::new("npx").args(["--no-install", "asc", "--version"]).current_dir(&project))?;
            version.trim().replace("Version", "asc")
        }
    };
    Ok(Guest { toolchain, folder })
}

/// Builds `fixtures/traps` in `language`, with the symbols that `docs/modules.md` recommends.
pub(super) fn traps(language: Language) -> Result<PathBuf> {
    let source = root().join("fixtures/traps");
    let folder = root().join("target/guests").join(language.folder());
    std::fs::create_dir_all(&folder)?;
    let module = folder.join("traps.wasm");
    match language {
        Language::Rust | Language::RustSdk => {
            tools::rust_target("wasm32-unknown-unknown")?;
            let arguments =
                "--target wasm32-unknown-unknown --edition 2024 --crate-type cdylib -C opt-level=3 -C debuginfo=line-tables-only";
            run(Command::new("rustc").args(arguments.split(' ')).arg("trap.rs").arg("-o").arg(&module).current_dir(&source))?;
        }
        Language::C | Language::Cpp => {
            let clang = Clang::install()?;
            let (compiler, file) = if language == Language::C { (&clang.c, "trap.c") } else { (&clang.cpp, "trap.cpp") };
            let arguments = "--target=wasm32-wasi -O2 -g -Wall -Wextra -Werror -mexec-model=reactor";
            let mut compile = Command::new(compiler);
            if language == Language::Cpp {
                compile.arg("-fno-exceptions");
            }
            run(compile.args(arguments.split(' ')).arg(file).arg("-o").arg(&module).current_dir(&source))?;
        }
        Language::Zig => {
            let python = FromPypi::Zig.install()?.join("python3");
            let arguments = "build-exe -target wasm32-freestanding -O ReleaseSafe -fno-strip -fno-entry -rdynamic -Mroot=trap.zig";
            run(zig_at(&python, &source).args(arguments.split(' ')).arg(format!("-femit-bin={}", module.display())))?;
        }
        Language::Go => {
            let program = FromPypi::Go.install()?.join("go");
            run(go_at(&program, &source)
                .env("GOOS", "wasip1")
                .env("GOARCH", "wasm")
                .args(["build", "-buildmode=c-shared", "-trimpath", "-o"])
                .arg(&module)
                .arg("trap.go"))?;
        }
        Language::AssemblyScript => {
            let project = toolchain::assemblyscript()?;
            // Names of functions begin with the path relative to the project.
            std::fs::copy(source.join("trap.ts"), project.join("trap.ts"))?;
            let asc = "--no-install asc --optimizeLevel 3 --runtime incremental --debug";
            run(Command::new("npx").args(asc.split(' ')).args(["trap.ts", "-o"]).arg(&module).current_dir(&project))?;
        }
    }
    Ok(module)
}

fn zig_at(python: &Path, source: &Path) -> Command {
    let mut zig = Command::new(python);
    // The default is a cache in the folder of the sources.
    zig.args(["-m", "ziglang"]).current_dir(source).env("ZIG_LOCAL_CACHE_DIR", root().join("target/guests/zig-cache"));
    zig
}

fn go_at(program: &Path, folder: &Path) -> Command {
    let mut go = Command::new(program);
    // Prevents downloads of another Go or of modules.
    go.current_dir(folder).env("GOTOOLCHAIN", "local").env("GOPROXY", "off");
    go
}

fn zig(source: &Path, into: impl Fn(&str) -> PathBuf) -> Result<String> {
    let python = FromPypi::Zig.install()?.join("python3");
    let zig = || zig_at(&python, source);
    for policy in POLICIES {
        run(zig()
            .args("build-exe -target wasm32-freestanding -O ReleaseSmall -fno-entry -rdynamic --dep zentinel".split(' '))
            .arg(format!("-Mroot={policy}/main.zig"))
            .arg("-Mzentinel=../../sdk/zig/zentinel.zig")
            .arg(format!("-femit-bin={}", into(policy).display())))?;
    }
    run(zig().args(["fmt", "--check", ".", "../../sdk/zig"]))
        .context("the Zig sources are not formatted: run `zig fmt sdk/zig examples/zig`")?;
    Ok(format!("zig {}", output(zig().arg("version"))?.trim()))
}

fn go(source: &Path, into: impl Fn(&str) -> PathBuf) -> Result<String> {
    let program = FromPypi::Go.install()?.join("go");
    let go = |folder: &Path| go_at(&program, folder);
    let sdk = root().join("sdk/go");
    run(go(&sdk).args(["vet", "./..."]))?;
    run(go(&sdk).args(["test", "./..."]))?;
    for policy in POLICIES {
        run(go(source)
            .env("GOOS", "wasip1")
            .env("GOARCH", "wasm")
            .args(["build", "-buildmode=c-shared", "-trimpath", "-ldflags=-s -w", "-o"])
            .arg(into(policy))
            .arg(format!("./{policy}")))?;
    }
    let version = output(go(source).arg("version"))?;
    tools::announce(version.trim());
    Ok(version.split_whitespace().nth(2).unwrap_or_default().replace("go", "go "))
}
