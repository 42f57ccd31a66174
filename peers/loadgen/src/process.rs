//! A process's use of processor time and memory, from the kernel.

use std::fs;
use std::time::Duration;

use nix::time::ClockId;
use nix::unistd::Pid;

/// The processor time of all threads of `pid`, including ended ones, with nanosecond precision.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration, String> {
    let read = || {
        let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(pid).ok()?)).ok()?;
        Some(Duration::from(clock.now().ok()?))
    };
    read().ok_or_else(|| format!("cannot read the processor time of process {pid}"))
}

/// Resident memory in kB.
#[derive(Clone, Copy, serde::Serialize)]
pub(crate) struct Memory {
    pub(crate) resident_kb: u64,
    pub(crate) peak_resident_kb: u64,
    /// Resident memory that is not backed by a file: heap, stacks, instances.
    pub(crate) anonymous_kb: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory, String> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(|error| format!("cannot read `{path}`: {error}"))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .ok_or_else(|| format!("`{path}` has no `{name}`"))
    };
    Ok(Memory { resident_kb: field("VmRSS")?, peak_resident_kb: field("VmHWM")?, anonymous_kb: field("RssAnon")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_usage_of_this_process() {
        let pid = std::process::id();
        let before = cpu_time(pid).unwrap();
        let memory = memory(pid).unwrap();
        assert!(memory.peak_resident_kb >= memory.anonymous_kb);
        assert!(cpu_time(pid).unwrap() > before);
    }
}
