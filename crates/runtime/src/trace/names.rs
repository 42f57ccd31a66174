//! Names of functions in traces.

/// Longest mangled name that is demangled, in bytes. Names of real generic functions may have a few
/// thousand.
const MAX_MANGLED: usize = 16 << 10;

/// Longest demangled name, in bytes: enough to recognise machinery, and more than is shown.
const MAX_DEMANGLED: usize = 1024;

/// Functions between a guest's own code and the instruction that traps, by the beginning of their
/// names.
const MACHINERY: &[&str] = &[
    // Rust.
    "core::panicking::",
    "core::option::unwrap_failed",
    "core::option::expect_failed",
    "core::result::unwrap_failed",
    "core::slice::index::slice_",
    "core::str::slice_error_fail",
    "core::cell::panic_",
    "std::panicking::",
    "std::process::abort",
    "std::sys::backtrace::",
    "std::rt::",
    "alloc::alloc::handle_alloc_error",
    "alloc::raw_vec::handle_error",
    "alloc::raw_vec::capacity_overflow",
    "panic_abort::",
    "__rustc::rust_begin_unwind",
    "__rustc::rust_panic",
    "__rustc::__rust_",
    "__rustc::__rdl_oom",
    "__rustc::__rg_oom",
    "rust_begin_unwind",
    "rust_panic",
    "__rust_",
    // Go.
    "runtime.gopanic",
    "runtime.goPanic",
    "runtime.panic",
    "runtime.fatal",
    "runtime.throw",
    "runtime.exit",
    "runtime.sigpanic",
    "runtime.dopanic",
    "runtime.abort",
    "runtime.crash",
    "runtime.systemstack",
    "runtime.mcall",
    // TinyGo.
    "runtime._panic",
    "runtime.runtimePanic",
    "runtime.nilPanic",
    "runtime.lookupPanic",
    "runtime.slicePanic",
    "runtime.divideByZeroPanic",
    "runtime.trap",
    // C and C++.
    "__assert_fail",
    "__stack_chk_fail",
    "__cxa_",
    "__wasi_proc_exit",
    "__wasilibc_",
    "std::terminate",
    "std::__terminate",
    "abort_message",
    // Zig.
    "builtin.default_panic",
    "builtin.panic",
    "debug.panic",
    "debug.defaultPanic",
    "debug.FullPanic",
    "debug.no_panic",
    "debug.simple_panic",
    "process.abort",
    "posix.abort",
    // AssemblyScript.
    "~lib/builtins/abort",
    "~lib/wasi_internal/wasi_abort",
];

/// The same by their whole names, which are those of ordinary words.
const MACHINERY_NAMES: &[&str] =
    &["abort", "_abort", "exit", "_exit", "_Exit", "panic", "raise", "wasm_pc_f_loop", "wasm_pc_f_loop_export", "_rt0_wasm_wasip1_lib"];

/// Whether the function with this demangled name only carries a failure on from the code that
/// caused it.
pub(super) fn is_machinery(name: &str) -> bool {
    MACHINERY_NAMES.contains(&name) || name.ends_with("::abort_internal") || MACHINERY.iter().any(|beginning| name.starts_with(beginning))
}

/// The name as its author wrote it, for names that Rust's compiler has mangled. Linkers demangle
/// those of C++.
pub(super) fn demangled(name: &str) -> String {
    let mut out = Bounded(String::new());
    match rustc_demangle::try_demangle(name) {
        Ok(rust) if name.len() <= MAX_MANGLED => {
            // An error means that the name is longer than the limit.
            let _ = std::fmt::Write::write_fmt(&mut out, format_args!("{rust:#}"));
        }
        _ => {
            let _ = std::fmt::Write::write_str(&mut out, name);
        }
    }
    out.0
}

/// A string that takes [`MAX_DEMANGLED`] bytes at most.
struct Bounded(String);

impl std::fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = MAX_DEMANGLED.saturating_sub(self.0.len());
        self.0.push_str(&text[..text.floor_char_boundary(room)]);
        if text.len() <= room { Ok(()) } else { Err(std::fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rust_names_are_demangled() {
        assert_eq!(demangled("_ZN9my_policy5check17h0123456789abcdefE"), "my_policy::check");
        assert_eq!(demangled("_RNvC9my_policy5check"), "my_policy::check");
        assert_eq!(demangled("main.(*Policy).Check"), "main.(*Policy).Check");
        assert_eq!(demangled("_ZNot a name"), "_ZNot a name");
    }

    #[test]
    fn long_names_are_bounded() {
        assert_eq!(demangled(&"\u{e9}".repeat(1 << 20)).len(), MAX_DEMANGLED);
        // Each back-reference doubles the name.
        let mut doubling = String::from("_RMC0TTuuE");
        for at in 0..60 {
            doubling.push_str(&format!("B{at:x}_"));
        }
        assert!(demangled(&doubling).len() <= MAX_DEMANGLED);
    }

    #[test]
    fn only_machinery_is_machinery() {
        for name in [
            "core::panicking::panic_fmt",
            "std::sys::pal::wasm::common::abort_internal",
            "__rustc::rust_begin_unwind",
            "runtime.goPanicIndex",
            "abort",
            "debug.FullPanic((x)).call",
        ] {
            assert!(is_machinery(name), "{name}");
        }
        for name in ["abort_request", "panic_button", "main.panic", "my_policy::check", "runtime.mapassign", "std::fs::read"] {
            assert!(!is_machinery(name), "{name}");
        }
    }
}
