//! The modules of the measured agents.

use crate::cargo;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use testkit::module;

/// A module that a case uses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Module {
    /// The product page's example, in plain Rust with serde.
    Security,
    /// The same policy, written with the Rust SDK.
    Sdk,
    /// Reads every byte of a request body and allows it.
    Body,
    /// Never returns for `/loop`, allows everything else.
    Loop,
}

pub(crate) struct Modules {
    security: PathBuf,
    sdk: PathBuf,
    body: PathBuf,
    endless: PathBuf,
}

impl Modules {
    pub(crate) fn path(&self, module: Module) -> &Path {
        match module {
            Module::Security => &self.security,
            Module::Sdk => &self.sdk,
            Module::Body => &self.body,
            Module::Loop => &self.endless,
        }
    }
}

/// Builds them into `dir`.
pub(crate) fn build(dir: &Path) -> Result<Modules> {
    // Both crates have the same name, so cargo writes the same file for both.
    let keep = |name: &str, built: PathBuf| -> Result<PathBuf> {
        let path = dir.join(name);
        std::fs::copy(&built, &path).with_context(|| format!("copying {}", built.display()))?;
        Ok(path)
    };
    Ok(Modules {
        security: keep("security.wasm", cargo::guest("examples/rust/security")?)?,
        sdk: keep("sdk-security.wasm", cargo::guest("examples/rust-sdk/security")?)?,
        body: module::write(dir, "body.wasm", BODY),
        endless: module::write(dir, "loop.wasm", LOOP),
    })
}

/// Adds up the body 8 bytes at a time, which is cheap, so the case measures the host.
const BODY: &str = r#"(module
    (memory (export "memory") 64)
    (func (export "alloc") (param i32) (result i32) (i32.const 65536))
    (func (export "dealloc") (param i32 i32))
    (global $sum (mut i64) (i64.const 0))
    (func (export "on_request_body") (param $at i32) (param $length i32) (result i64)
        (local $end i32)
        (local.set $end (i32.add (local.get $at) (local.get $length)))
        (loop $next
            (global.set $sum (i64.add (global.get $sum) (i64.load (local.get $at))))
            (local.set $at (i32.add (local.get $at) (i32.const 8)))
            (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
        (i64.const 0)))"#;

/// Searches for the bytes `/loop`.
const LOOP: &str = r#"(module
    (memory (export "memory") 16)
    (func (export "alloc") (param i32) (result i32) (i32.const 65536))
    (func (export "dealloc") (param i32 i32))
    (func (export "on_request_headers") (param $at i32) (param $length i32) (result i64)
        (local $end i32)
        (local.set $end (i32.add (local.get $at) (local.get $length)))
        (loop $next
            (if (i32.and
                    (i32.eq (i32.load (local.get $at)) (i32.const 0x6f6f6c2f))
                    (i32.eq (i32.load8_u offset=4 (local.get $at)) (i32.const 0x70)))
                (then (loop $forever (br $forever))))
            (local.set $at (i32.add (local.get $at) (i32.const 1)))
            (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
        (i64.const 0)))"#;
