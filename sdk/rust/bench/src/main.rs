//! Measures the cost of the hooks of modules, without an agent.
//!
//!     cargo run --release --manifest-path sdk/rust/bench/Cargo.toml
//!
//! builds the policies of the product page and of the SDK, calls them in turn, and prints the best
//! round of each. With module paths as arguments, it compares those instead.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use wasmtime::{Caller, Engine, Instance, Linker, Memory, Module, Result, Store, TypedFunc};

/// Rounds per module. The best round is reported, because other load disturbs it least.
const ROUNDS: usize = 15;
const CALLS: u32 = 20_000;

/// The request of a browser, in the agent's format.
const REQUEST: &str = r#"{"method":"GET","uri":"/api/users?page=1","client_ip":"192.168.1.100","correlation_id":"0af7651916cd43dd","headers":{"Accept":"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8","Accept-Encoding":"gzip, deflate, br, zstd","Accept-Language":"en-GB,en;q=0.5","Cookie":"session=0123456789abcdef0123456789abcdef","Host":"shop.example","User-Agent":"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"},"protocol":"HTTP/1.1"}"#;

struct Guest {
    store: Store<()>,
    memory: Memory,
    alloc: TypedFunc<u32, u32>,
    dealloc: TypedFunc<(u32, u32), ()>,
    hook: TypedFunc<(u32, u32), u64>,
}

impl Guest {
    fn load(engine: &Engine, path: &PathBuf) -> Result<Self> {
        let module = Module::from_file(engine, path)?;
        let mut linker: Linker<()> = Linker::new(engine);
        linker.func_wrap("zentinel", "log", |_: Caller<'_, ()>, _: i32, _: i32, _: i32| {})?;
        let mut store = Store::new(engine, ());
        let instance: Instance = linker.instantiate(&mut store, &module)?;
        let memory = instance.get_memory(&mut store, "memory").ok_or_else(|| wasmtime::Error::msg("no memory"))?;
        let alloc = instance.get_typed_func(&mut store, "alloc")?;
        let dealloc = instance.get_typed_func(&mut store, "dealloc")?;
        let hook = instance.get_typed_func(&mut store, "on_request_headers")?;
        Ok(Self { store, memory, alloc, dealloc, hook })
    }

    /// Makes a call as the agent does. Returns the time of the hook alone, which includes the same
    /// overhead for reading the clock for every guest.
    fn call(&mut self) -> Result<Duration> {
        let size = u32::try_from(REQUEST.len())?;
        let input = self.alloc.call(&mut self.store, size)?;
        self.memory.write(&mut self.store, input as usize, REQUEST.as_bytes())?;
        let start = Instant::now();
        let answer = self.hook.call(&mut self.store, (input, size))?;
        let took = start.elapsed();
        self.dealloc.call(&mut self.store, (input, size))?;
        if answer as u32 > 0 {
            self.dealloc.call(&mut self.store, ((answer >> 32) as u32, answer as u32))?;
        }
        Ok(took)
    }

    fn round(&mut self) -> Result<Duration> {
        let mut total = Duration::ZERO;
        for _ in 0..CALLS {
            total += self.call()?;
        }
        Ok(total / CALLS)
    }
}

/// Builds the policies of `examples/` and returns their modules: per policy, that of the product
/// page, then that of the SDK.
fn build() -> Vec<PathBuf> {
    let examples = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../examples"));
    let mut modules = Vec::new();
    for policy in ["security", "bot_protection"] {
        for folder in ["rust", "rust-sdk"] {
            let folder = examples.join(folder);
            let built = Command::new("cargo")
                .args(["build", "--quiet", "--locked", "--release", "--target", "wasm32-unknown-unknown"])
                .current_dir(&folder)
                .env_remove("CARGO_TARGET_DIR")
                .status();
            assert!(built.is_ok_and(|status| status.success()), "cannot build `{}`", folder.display());
            modules.push(folder.join("target/wasm32-unknown-unknown/release").join(policy).with_extension("wasm"));
        }
    }
    modules
}

fn main() -> Result<()> {
    let mut modules: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if modules.is_empty() {
        modules = build();
    }
    let engine = Engine::default();
    let mut guests = modules.iter().map(|path| Guest::load(&engine, path)).collect::<Result<Vec<_>>>()?;
    let mut best = vec![Duration::MAX; guests.len()];
    for _ in 0..ROUNDS {
        for (guest, best) in guests.iter_mut().zip(&mut best) {
            *best = guest.round()?.min(*best);
        }
    }
    for (path, best) in modules.iter().zip(best) {
        let name = path.strip_prefix(std::env::current_dir()?).unwrap_or(path);
        println!("{:>6} ns  {:>6} B  {}", best.as_nanos(), path.metadata()?.len(), name.display());
    }
    Ok(())
}
