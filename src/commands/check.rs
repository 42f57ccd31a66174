//! `check`: everything that a deployment wants to know about a module before it is served. The
//! module is read, compiled and started as for serving, with the same options.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use zentinel_wasm_contract::{Hook, shortened};
use zentinel_wasm_runtime::{Isolation, Module, Runtime, Trial};

use super::proxy_config::{Addresses, Findings, ProxyConfig};
use crate::cache;
use crate::cli::{CheckOptions, Cli};
use crate::listen::tls::ReloadableTls;
use crate::process::NO_THREADS;

/// Most exports or imports of a report in text. JSON has more of them.
const MAX_SHOWN: usize = 40;

/// Most characters that a misspelled hook has wrong.
const MAX_WRONG: usize = 2;

/// Longest line of a report, in characters: a module's most problems are shorter.
const MAX_LINE: usize = 8000;

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    path: String,
    sha256: Option<String>,
    size: Option<usize>,
    memory_limit: u64,
    trial: Trial,
    /// Why the agent would not start, each in one line.
    problems: Vec<String>,
    /// What is probably not intended, each in one line.
    warnings: Vec<String>,
}

impl Report {
    /// Checks what `options` would serve.
    pub async fn of(options: &CheckOptions) -> Self {
        let cli = &options.serve;
        let mut report = Self {
            path: cli.module.display().to_string(),
            memory_limit: cli.max_memory_mb << 20,
            warnings: cli.warnings().to_vec(),
            ..Self::default()
        };
        report.warnings.extend(cli.settings().warnings());
        if let Some(Err(error)) = cli.grpc_tls().map(ReloadableTls::open) {
            report.problems.push(format!("{error:#}"));
        }
        if let Some(error) = cli.decision_log().and_then(|log| log.file?.problem()) {
            report.problems.push(error.to_string());
        }
        if let Some(Err(error)) = cli.otlp().map(|options| options.check()) {
            report.problems.push(format!("{error:#}"));
        }
        match Module::read(&cli.module, cli.module_sha256.as_deref()) {
            Ok(module) => {
                let proxy = options.proxy_config.as_deref().map(ProxyConfig::read).transpose();
                let proxy = proxy.unwrap_or_else(|problem| {
                    report.problems.push(problem);
                    None
                });
                report.try_module(cli, &Arc::new(module), proxy.as_ref()).await;
            }
            Err(error) => report.problems.extend(error.problems().iter().cloned()),
        }
        report
    }

    async fn try_module(&mut self, cli: &Cli, module: &Arc<Module>, proxy: Option<&ProxyConfig>) {
        self.sha256 = Some(module.digest().to_owned());
        self.size = Some(module.size());
        let mut settings = cli.settings();
        let addresses = Addresses { socket: &cli.socket, grpc: cli.grpc_address };
        // The proxy configures the agent before the first request.
        match proxy.map(|proxy| proxy.settings(&addresses, &settings)).transpose() {
            Ok(configured) => settings = configured.unwrap_or(settings),
            Err(problem) => self.problems.push(problem),
        }
        self.memory_limit = u64::from(settings.max_memory_mb) << 20;
        let runtime = match Runtime::start() {
            Ok(runtime) => runtime,
            Err(error) => return self.problems.push(format!("{NO_THREADS}: {error}")),
        };
        let cache = cache::open(cli.cache_dir.as_deref());
        self.trial = Trial::run(&runtime, module, settings.pool(), cache.as_ref()).await;
        if let Some(error) = &self.trial.error {
            self.problems.extend(error.problems().into_iter().map(with_hint));
        }
        if let Some(proxy) = proxy.filter(|_| self.trial.compiled.is_some()) {
            let Findings { problems, warnings } = proxy.findings(&addresses, &settings, self.trial.hooks);
            self.problems.extend(problems);
            self.warnings.extend(warnings);
        }
        if self.trial.ignores_config {
            self.warnings.push(format!("the module ignores its configuration, because it does not export `{}`", Hook::Configure));
        }
        for export in &self.trial.exports {
            if let Some(hook) = misspelled(&export.name) {
                self.warnings.push(format!("its export `{}` is not a hook: did you mean `{hook}`?", export.name));
            }
        }
        if let Some(started) = self.trial.started
            && settings.isolation == Isolation::Request
            && started.fresh >= settings.timeout
        {
            self.warnings.push(format!(
                "a fresh instance takes {}, so with `--isolation request` every call exceeds its deadline: raise `--timeout-ms` above it, \
                 or use `--isolation pooled`",
                Milliseconds(started.fresh)
            ));
        }
    }

    /// Whether the agent would serve.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty()
    }

    /// The report as an object. Its fields are an interface: see docs/operations.md.
    pub fn json(&self) -> Value {
        let Trial { exports, imports, proposals, hooks, compiled, started, .. } = &self.trial;
        let milliseconds = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        json!({
            "ok": self.is_ok(),
            "module": self.path,
            "sha256": self.sha256,
            "size_bytes": self.size,
            "hooks": hooks.iter().map(Hook::export).collect::<Vec<_>>(),
            "exports": exports.iter().map(|export| json!({"name": export.name, "type": export.ty})).collect::<Vec<_>>(),
            "imports": imports
                .iter()
                .map(|import| json!({"module": import.module, "name": import.name, "type": import.ty}))
                .collect::<Vec<_>>(),
            "proposals": proposals,
            "memory": {
                "start_bytes": started.map(|started| started.memory_at_start),
                "configured_bytes": started.map(|started| started.memory),
                "limit_bytes": self.memory_limit,
            },
            "times": {
                "compile_ms": compiled.map(|compiled| milliseconds(compiled.time)),
                "from_cache": compiled.map(|compiled| compiled.from_cache),
                "start_ms": started.map(|started| milliseconds(started.first)),
                "fresh_instance_ms": started.map(|started| milliseconds(started.fresh)),
            },
            "problems": self.problems,
            "warnings": self.warnings,
        })
    }
}

/// For people: a line for the result, one for each subject, and one for each problem and warning.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Trial { exports, imports, proposals, hooks, compiled, started, .. } = &self.trial;
        let line = |text: String| shortened(&text, MAX_LINE);
        let result = match self.problems.len() {
            0 => "can be served".to_owned(),
            1 => "1 problem".to_owned(),
            many => format!("{many} problems"),
        };
        writeln!(f, "{}", line(format!("{}: {result}", self.path)))?;
        let mut subject = |name: &str, text: String| writeln!(f, "  {}", line(format!("{name:<11}{text}")));
        if let Some(sha256) = &self.sha256 {
            subject("SHA-256", sha256.clone())?;
        }
        if let Some(size) = self.size {
            subject("size", Bytes(size as u64).to_string())?;
        }
        if compiled.is_some() {
            subject("hooks", list(hooks.iter().map(|hook| hook.export().to_owned())))?;
        }
        if compiled.is_some() || !exports.is_empty() {
            subject("exports", list(exports.iter().map(|export| export.name.clone())))?;
            subject("imports", list(imports.iter().map(|import| format!("{}.{}", import.module, import.name))))?;
        }
        if let Some(compiled) = compiled {
            subject("proposals", list(proposals.iter().map(|name| (*name).to_owned())))?;
            let origin = if compiled.from_cache { "to load from the cache" } else { "to compile" };
            subject("time", format!("{} {origin}", Milliseconds(compiled.time)))?;
        }
        if let Some(started) = started {
            let (first, fresh) = (Milliseconds(started.first), Milliseconds(started.fresh));
            subject("", format!("{first} to start, {fresh} for a fresh instance"))?;
            let (start, ready, limit) = (Bytes(started.memory_at_start as u64), Bytes(started.memory as u64), Bytes(self.memory_limit));
            subject("memory", format!("{start} at start, {ready} when ready, limit {limit}"))?;
        }
        for problem in &self.problems {
            writeln!(f, "{}", line(format!("problem: {problem}")))?;
        }
        for warning in &self.warnings {
            writeln!(f, "{}", line(format!("warning: {warning}")))?;
        }
        Ok(())
    }
}

/// The problem with a hint how to mend it. Most have one; that of an unknown import would be
/// repeated too often in the one line of serving.
fn with_hint(problem: String) -> String {
    let is_bare_import = problem.starts_with("unknown import ") && problem.ends_with('`');
    if is_bare_import { format!("{problem} (link what defines it)") } else { problem }
}

/// The hook for which an export was probably meant.
fn misspelled(export: &str) -> Option<Hook> {
    if Hook::ALL.into_iter().any(|hook| hook.export() == export) {
        return None;
    }
    let lower = export.to_ascii_lowercase();
    let wrong = Hook::ALL.into_iter().map(|hook| (strsim::levenshtein(hook.export(), &lower), hook));
    wrong.filter(|(wrong, _)| *wrong <= MAX_WRONG).min_by_key(|(wrong, _)| *wrong).map(|(_, hook)| hook)
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<_> = items.collect();
    let more = items.len().saturating_sub(MAX_SHOWN);
    // Go imports a function twice.
    let (mut seen, mut shown) = (BTreeSet::new(), Vec::new());
    for item in items.into_iter().take(MAX_SHOWN) {
        if seen.insert(item.clone()) {
            shown.push(item);
        }
    }
    match (shown.as_slice(), more) {
        ([], _) => "none".into(),
        (shown, 0) => shown.join(", "),
        (shown, more) => format!("{} and {more} more", shown.join(", ")),
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 => write!(f, "{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
            bytes if bytes >= 1 << 10 => write!(f, "{:.1} KiB", bytes as f64 / f64::from(1 << 10)),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

struct Milliseconds(Duration);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ms", self.0.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_misspelled_hooks() {
        for (export, hook) in [
            ("on_request_header", Some(Hook::RequestHeaders)),
            ("onRequestHeaders", Some(Hook::RequestHeaders)),
            ("on_reponse_headers", Some(Hook::ResponseHeaders)),
            ("on_configured", Some(Hook::Configure)),
            ("on_request_headers", None),
            ("on_request_body", None),
            ("alloc", None),
            ("on_tick", None),
        ] {
            assert_eq!(misspelled(export), hook, "{export}");
        }
    }

    #[test]
    fn lists_are_bounded_and_without_repetition() {
        assert_eq!(list(Vec::new().into_iter()), "none");
        assert_eq!(list(vec!["a".to_owned(), "a".into(), "b".into()].into_iter()), "a, b");
        let many = list((0..MAX_SHOWN + 2).map(|number| number.to_string()));
        assert!(many.ends_with("39 and 2 more"), "{many}");
    }

    #[test]
    fn sizes_have_a_unit() {
        let shown = [999, 64 << 10, 1_572_864].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(shown, ["999 bytes", "64.0 KiB", "1.5 MiB"]);
    }
}
