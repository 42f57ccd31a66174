//! Counts what is decided, and by which rules.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use prometheus::{IntCounter, IntCounterVec};
use zentinel_wasm_contract::Hook;
use zentinel_wasm_contract::answer::Printable;

use crate::outcome::DecisionKind;

/// Most rules with a series of their own. A module may name any number of rules, and each series
/// costs memory here and in Prometheus.
pub(super) const MAX_RULES: usize = 200;

/// Longest rule id that gets a series, in bytes.
const MAX_RULE_LEN: usize = 64;

/// Most rule ids of one answer that are counted. Counting takes time on the connection's task.
const MAX_RULES_PER_ANSWER: usize = 64;

/// The label of all rules without a series of their own.
const OTHER: &str = "other";

/// The counters of decisions, by hook and kind.
pub(super) struct DecisionCounters(Vec<[Option<IntCounter>; DecisionKind::ALL.len()]>);

impl DecisionCounters {
    /// Every series exists from the start, because a series that appears with value 1 is not an
    /// increase for Prometheus.
    pub(super) fn new(counters: &IntCounterVec) -> Self {
        let of_hook = |hook: Hook| {
            DecisionKind::ALL.map(|kind| kind.is_possible(hook).then(|| counters.with_label_values(&[hook.export(), kind.name()])))
        };
        Self(Hook::ALL.into_iter().map(of_hook).collect())
    }

    pub(super) fn count(&self, hook: Hook, decision: DecisionKind) {
        if let Some(counter) = &self.0[hook as usize][decision as usize] {
            counter.inc();
        }
    }
}

/// Counts how often the module names each rule.
pub(crate) struct RuleHits {
    counters: IntCounterVec,
    known: RwLock<HashMap<String, IntCounter>>,
    other: IntCounter,
}

impl RuleHits {
    pub(super) fn new(counters: IntCounterVec) -> Self {
        let other = counters.with_label_values(&[OTHER]);
        Self { counters, known: RwLock::default(), other }
    }

    /// Counts the rules that one answer names.
    pub(crate) fn count(&self, rules: &[Printable<'_>]) {
        for rule in rules.iter().take(MAX_RULES_PER_ANSWER) {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(counter) = known.get(rule.as_str()) {
                counter.inc();
            } else if known.len() < MAX_RULES && is_label(rule) {
                drop(known);
                self.count_new(rule);
            } else {
                self.other.inc();
            }
        }
    }

    fn count_new(&self, rule: &str) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have added rules meanwhile.
        if known.len() < MAX_RULES || known.contains_key(rule) {
            known.entry(rule.to_owned()).or_insert_with(|| self.counters.with_label_values(&[rule])).inc();
        } else {
            self.other.inc();
        }
    }
}

/// Whether a rule id may become a label. Others would be hard to write in a query, or contain parts
/// of a request.
fn is_label(rule: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b" _.:/@#+-".contains(&byte);
    (1..=MAX_RULE_LEN).contains(&rule.len()) && rule.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use prometheus::Opts;
    use prometheus::core::Collector as _;
    use zentinel_wasm_contract::Text;

    use super::*;

    fn count(hits: &RuleHits, rules: &[&str]) {
        let rules: Vec<_> = rules.iter().map(|rule| Printable::new(Text::borrowed(rule)).unwrap()).collect();
        hits.count(&rules);
    }

    fn hits() -> (RuleHits, IntCounterVec) {
        let counters = IntCounterVec::new(Opts::new("hits", "hits"), &["rule_id"]).unwrap();
        (RuleHits::new(counters.clone()), counters)
    }

    fn value(counters: &IntCounterVec, rule: &str) -> u64 {
        counters.with_label_values(&[rule]).get()
    }

    fn series(counters: &IntCounterVec) -> usize {
        counters.collect().iter().map(|family| family.get_metric().len()).sum()
    }

    #[test]
    fn rules_are_counted_each() {
        let (hits, counters) = hits();
        count(&hits, &["sqli-1", "xss"]);
        count(&hits, &["sqli-1"]);
        assert_eq!((value(&counters, "sqli-1"), value(&counters, "xss"), value(&counters, OTHER)), (2, 1, 0));
    }

    #[test]
    fn rules_beyond_the_limit_are_counted_together() {
        let (hits, counters) = hits();
        for rule in 0..MAX_RULES + 50 {
            count(&hits, &[&rule.to_string()]);
        }
        assert_eq!((series(&counters), value(&counters, OTHER)), (MAX_RULES + 1, 50));
        // Those that are known are still counted.
        count(&hits, &["0", "1000"]);
        assert_eq!((value(&counters, "0"), value(&counters, OTHER)), (2, 51));
    }

    #[test]
    fn unsuitable_rules_are_counted_together() {
        let (hits, counters) = hits();
        let long = "x".repeat(MAX_RULE_LEN + 1);
        count(&hits, &["", &long, "a\"b", "a\\b", "r\u{e9}gle", "a{b}", &"y".repeat(MAX_RULE_LEN)]);
        assert_eq!((series(&counters), value(&counters, OTHER)), (2, 6));
    }

    #[test]
    fn the_rules_of_one_answer_are_bounded() {
        let (hits, counters) = hits();
        count(&hits, &["a"; MAX_RULES_PER_ANSWER + 1]);
        assert_eq!(value(&counters, "a"), MAX_RULES_PER_ANSWER as u64);
    }
}
