//! Differences between versions of the proxy.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::{Answer, Block, BlockStatus, Decision};

/// How the proxy of a connection differs from the current version. Default: not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxy {
    /// Treats a challenge as an allow: versions before 0.6.51.
    pub lets_challenges_through: bool,
}

impl Proxy {
    /// The proxy of this version. An unreadable version counts as current.
    pub fn of_version(version: &str) -> Self {
        let mut numbers = version.split(['.', '-', '+']).map(str::parse::<u32>);
        let known = match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch))) => Some((major, minor, patch)),
            _ => None,
        };
        Self { lets_challenges_through: known.is_some_and(|version| version < (0, 6, 51)) }
    }

    /// Like [`of_version`](Self::of_version), and logs what the agent has to do differently.
    pub(crate) fn connected(version: &str) -> Self {
        let proxy = Self::of_version(version);
        if proxy.lets_challenges_through {
            log_limited!(
                info,
                proxy_version = version,
                "the proxy does not support challenges: sending blocks instead; its redirects fail with a 500; use 0.6.51 or later"
            );
        }
        proxy
    }
}

/// Turns an answer into one that `proxy` understands: a challenge becomes a block, because an old
/// proxy would treat it as an allow.
pub(crate) fn for_proxy<'a, 'b>(answer: &'b Answer<'a>, proxy: Proxy) -> Cow<'b, Answer<'a>> {
    let Decision::Challenge { params, .. } = &answer.decision else { return Cow::Borrowed(answer) };
    if !proxy.lets_challenges_through {
        return Cow::Borrowed(answer);
    }
    let block = Block::new(BlockStatus::FORBIDDEN, params.body().cloned());
    Cow::Owned(Answer { decision: Decision::Block(block), ..answer.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreadable_version_counts_as_current() {
        for (version, old) in
            [("0.6.50", true), ("0.6.51", false), ("0.5.99", true), ("1.0.0", false), ("0.6.45-rc1", true), ("", false), ("x.y.z", false)]
        {
            assert_eq!(Proxy::of_version(version).lets_challenges_through, old, "{version}");
        }
    }
}
