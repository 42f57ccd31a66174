//! Measures each stage of a request separately: `cargo bench --bench stages`.
//!
//! The module is the product page's security example. Build it first with `cargo xtask demo
//! --once`.

#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use zentinel_wasm_contract::Encode;
use zentinel_wasm_contract::{HeaderCase, Hook};
use zentinel_wasm_guest_json::{answer, input};
use zentinel_wasm_protocol::socket::frame::kind;
use zentinel_wasm_protocol::socket::{Encoding, SocketEncoder, decode};
use zentinel_wasm_protocol::{Phase, Proxy};
use zentinel_wasm_runtime::{Call, Isolation, Module, Pool, PoolSettings, Runtime};

const MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/rust/target/wasm32-unknown-unknown/release/security.wasm");

/// The event of a browser's request, as the proxy sends it.
fn event(headers: usize) -> Vec<u8> {
    let names = [
        "host",
        "user-agent",
        "accept",
        "accept-language",
        "accept-encoding",
        "referer",
        "cookie",
        "cache-control",
        "sec-fetch-mode",
        "sec-fetch-site",
        "x-forwarded-for",
        "x-forwarded-proto",
    ];
    let headers: serde_json::Map<_, _> = (0..headers)
        .map(|at| {
            let name = names.get(at).map_or_else(|| format!("x-custom-{at}"), |name| (*name).to_owned());
            (name, serde_json::json!(["a value of some forty characters, as usual"]))
        })
        .collect();
    serde_json::to_vec(&serde_json::json!({
        "metadata": {
            "correlation_id": "0af76519-16cd-43dd-8448-eb211c80319c", "request_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
            "client_ip": "192.0.2.7:51234", "client_port": 0, "server_name": "example.com", "protocol": "HTTP/1.1", "tls_version": null,
            "tls_cipher": null, "route_id": "all", "upstream_id": "backend", "timestamp": "2026-01-01T00:00:00Z",
        },
        "method": "GET", "uri": "/api/users?page=1", "headers": headers, "correlation_id": "0af76519-16cd-43dd-8448-eb211c80319c",
    }))
    .unwrap()
}

fn guest_json(payload: &[u8]) -> Vec<u8> {
    let zentinel_wasm_contract::Event::RequestHeaders(event) = decode::event(Encoding::Json, kind::REQUEST_HEADERS, payload).unwrap()
    else {
        unreachable!()
    };
    let mut out = Vec::new();
    input::request(&mut out, &event, HeaderCase::Canonical);
    out
}

fn settings(isolation: Isolation) -> PoolSettings {
    PoolSettings { size: 4, max_memory: 64 << 20, max_output: 2 << 20, isolation, config: None, start_timeout: Duration::from_secs(1) }
}

async fn call(pool: &Pool, input: Vec<u8>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let call = Call::json(Hook::RequestHeaders, input);
    pool.clone().call(call, Arc::from("id"), deadline).await.unwrap_or_else(|failure| panic!("{failure}")).accept();
}

fn stages(c: &mut Criterion) {
    for headers in [4, 12, 40] {
        let payload = event(headers);
        c.bench_function(&format!("decode/{headers}"), |b| {
            b.iter(|| black_box(decode::event(Encoding::Json, kind::REQUEST_HEADERS, black_box(&payload)).unwrap()));
        });
        let zentinel_wasm_contract::Event::RequestHeaders(event) = decode::event(Encoding::Json, kind::REQUEST_HEADERS, &payload).unwrap()
        else {
            unreachable!()
        };
        let mut out = Vec::with_capacity(8192);
        c.bench_function(&format!("guest-json/{headers}"), |b| {
            b.iter(|| {
                out.clear();
                input::request(&mut out, black_box(&event), HeaderCase::Canonical);
            });
        });
    }

    let answers = [("allow", &br#"{"decision":"allow"}"#[..]), ("block", br#"{"decision":"block","status":403,"body":"Forbidden"}"#)];
    for (name, bytes) in answers {
        c.bench_function(&format!("parse/{name}"), |b| b.iter(|| black_box(answer::read(black_box(bytes)).unwrap())));
        let encoder = SocketEncoder {
            encoding: Encoding::Json,
            proxy: Proxy::default(),
            phase: Phase { hook: Hook::RequestHeaders, chunk_index: 0 },
            correlation_id: Arc::from("0af76519-16cd-43dd-8448-eb211c80319c"),
            connection: 0,
        };
        let answer = answer::read(bytes).unwrap();
        c.bench_function(&format!("encode/{name}"), |b| b.iter(|| black_box(encoder.encode(black_box(&answer)).unwrap())));
    }
}

fn calls(c: &mut Criterion) {
    let Ok(bytes) = std::fs::read(MODULE) else {
        eprintln!("cannot read `{MODULE}`: build it with `cargo xtask demo --once`");
        return;
    };
    let module = Arc::new(Module::from_bytes(MODULE, bytes, None).unwrap());
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let runtime = Runtime::start().unwrap();
    let input = guest_json(&event(12));
    for (name, isolation) in [("call/pooled", Isolation::Pooled), ("call/fresh-instance", Isolation::Request)] {
        let pool = tokio.block_on(Pool::start(&runtime, &module, settings(isolation), None)).unwrap();
        c.bench_function(name, |b| {
            b.iter_batched(|| input.clone(), |input| tokio.block_on(call(&pool, input)), BatchSize::SmallInput);
        });
    }
    // The cost of reloading the same module: an engine, its pool and four instances from compiled
    // code.
    c.bench_function("reload/compiled", |b| {
        b.iter(|| tokio.block_on(start(&runtime, &module)));
    });
    let mut group = c.benchmark_group("slow");
    group.sample_size(10);
    group.bench_function("reload/compile", |b| {
        b.iter(|| {
            let module = Arc::new(Module::from_bytes(MODULE, std::fs::read(MODULE).unwrap(), None).unwrap());
            tokio.block_on(start(&runtime, &module))
        });
    });
    group.finish();
}

/// Starts a pool and waits for all of its instances, as a reload does.
async fn start(runtime: &Runtime, module: &Arc<Module>) -> Pool {
    let pool = Pool::start(runtime, module, settings(Isolation::Pooled), None).await.unwrap();
    pool.warm().await;
    pool
}

criterion_group!(benches, stages, calls);
criterion_main!(benches);
