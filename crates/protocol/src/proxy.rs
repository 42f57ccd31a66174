//! What depends on the proxy's version.

use std::borrow::Cow;

use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::{Answer, Decision};

/// What is known of the proxy at the other end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Proxy {
    /// It lets a challenge through as if it were an allow: versions before 0.6.51.
    pub lets_challenges_through: bool,
}

impl Proxy {
    /// What is known of the proxy of this version. One that cannot be read counts as new.
    pub fn of_version(version: &str) -> Self {
        let mut numbers = version.split(['.', '-', '+']).map(str::parse::<u32>);
        let known = match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch))) => Some((major, minor, patch)),
            _ => None,
        };
        Self { lets_challenges_through: known.is_some_and(|version| version < (0, 6, 51)) }
    }

    /// The same, and what that means is said in the log.
    pub(crate) fn greet(version: &str) -> Self {
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

/// Turns an answer into what an old proxy understands.
///
/// A challenge becomes a block, for it would be waved through otherwise.
pub(crate) fn for_proxy<'a, 'b>(answer: &'b Answer<'a>, proxy: Proxy) -> Cow<'b, Answer<'a>> {
    let Decision::Challenge { params, .. } = &answer.decision else { return Cow::Borrowed(answer) };
    if !proxy.lets_challenges_through {
        return Cow::Borrowed(answer);
    }
    let body = params.iter().find(|(name, _)| name.eq_ignore_ascii_case("body")).map(|(_, body)| body.clone());
    Cow::Owned(Answer { decision: Decision::Block { status: 403, body, headers: Vec::new() }, ..answer.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_cannot_be_read_count_as_new() {
        for (version, old) in
            [("0.6.50", true), ("0.6.51", false), ("0.5.99", true), ("1.0.0", false), ("0.6.45-rc1", true), ("", false), ("x.y.z", false)]
        {
            assert_eq!(Proxy::of_version(version).lets_challenges_through, old, "{version}");
        }
    }
}
