//! The effect of two answers to one event.

use super::Answer;
use super::body::BodyMutation;
use super::decision::Decision;
use super::guardrail::GuardrailVerdict;
use super::websocket::WebsocketDecision;

impl Answer<'_> {
    /// The effect of two answers given to the same event, one after the other, as by a chain of
    /// policies.
    ///
    /// * The first refusal wins and ends the chain: nothing of `later` counts then.
    /// * Header changes are those of `self`, followed by those of `later`. A change that `later`
    ///   overrides is left out.
    /// * Audit data is concatenated; the higher confidence counts.
    /// * Routing metadata of `later` replaces entries of the same key.
    /// * More of the body is needed if either answer needs it.
    /// * A body mutation of `later` applies on top of that of `self`: its policy is expected to see
    ///   the chunk as `self` left it.
    /// * A WebSocket frame or an inspected text that `self` refuses stays refused.
    ///
    /// An answer carries a change to one chunk in each direction. So if both change a body, but
    /// name different chunks, only the change of `later` is kept.
    ///
    /// If `later` refuses the request, the changes of `self` to the upstream's response remain, but
    /// the block's response does not get them: proxies do the same for a chain of agents.
    #[must_use]
    pub fn merge(self, later: Self) -> Self {
        if self.decision != Decision::Allow {
            return self;
        }
        Self {
            decision: later.decision,
            request_headers: self.request_headers.merge(later.request_headers),
            response_headers: self.response_headers.merge(later.response_headers),
            audit: self.audit.merge(later.audit),
            routing_metadata: self.routing_metadata.merge(later.routing_metadata),
            needs_more: self.needs_more || later.needs_more,
            request_body_mutation: BodyMutation::merge(self.request_body_mutation, later.request_body_mutation),
            response_body_mutation: BodyMutation::merge(self.response_body_mutation, later.response_body_mutation),
            websocket_decision: WebsocketDecision::merge(self.websocket_decision, later.websocket_decision),
            guardrail_response: GuardrailVerdict::merge(self.guardrail_response, later.guardrail_response),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use crate::answer::{
        Answer, AnswerBuilder, Block, BlockStatus, BodyAction, BodyMutation, CloseCode, CloseReason, Confidence, Decision,
        GuardrailVerdict, HeaderOp, RoutingMetadata, WebsocketDecision,
    };
    use crate::text::Text;

    /// What a chain of policies has made of a request and its response.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Outcome {
        refusal: Option<Decision<'static>>,
        request: BTreeMap<String, Vec<String>>,
        response: BTreeMap<String, Vec<String>>,
        /// None is a chunk that was dropped.
        body: Option<Vec<u8>>,
        metadata: BTreeMap<String, String>,
        tags: Vec<String>,
        confidence: Option<f64>,
        needs_more: bool,
    }

    impl Outcome {
        fn start() -> Self {
            let headers = || ["a", "host", "location"].map(|name| (name.to_owned(), vec!["old".to_owned()])).into();
            Self { request: headers(), response: headers(), body: Some(b"old".to_vec()), ..Self::default() }
        }

        fn then(mut self, answer: &Answer<'static>) -> Self {
            if self.refusal.is_some() {
                return self;
            }
            change(&mut self.request, &answer.request_headers);
            change(&mut self.response, &answer.response_headers);
            match answer.request_body_mutation.as_ref().map(|mutation| &mutation.action) {
                None | Some(BodyAction::PassThrough) => {}
                Some(BodyAction::Replace(bytes)) => self.body = Some(bytes.to_vec()),
                Some(BodyAction::Drop) => self.body = None,
            }
            self.metadata.extend(answer.routing_metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())));
            self.tags.extend(answer.audit.tags.iter().map(ToString::to_string));
            let confidence = answer.audit.confidence.map(Confidence::get);
            self.confidence = self.confidence.into_iter().chain(confidence).reduce(f64::max);
            self.needs_more |= answer.needs_more;
            self.refusal = Some(answer.decision.clone()).filter(|decision| *decision != Decision::Allow);
            self
        }
    }

    fn change(headers: &mut BTreeMap<String, Vec<String>>, ops: &[HeaderOp<'_>]) {
        for op in ops {
            let name = op.name().to_ascii_lowercase();
            match op {
                HeaderOp::Set(_, value) => drop(headers.insert(name, vec![value.to_string()])),
                HeaderOp::Add(_, value) => headers.entry(name).or_default().push(value.to_string()),
                HeaderOp::Remove(_) => drop(headers.remove(&name)),
            }
        }
    }

    type Headers = Vec<(Text<'static>, Vec<Text<'static>>)>;

    /// Headers with names that differ by more than case. `single` is one that has one value.
    fn headers(single: &'static str) -> impl Strategy<Value = Headers> {
        let values = |count| prop::collection::vec("[x-z]".prop_map(Text::from), count);
        let many = |name: &'static str| {
            let spelling = prop::bool::ANY.prop_map(move |upper| if upper { name.to_uppercase() } else { name.to_owned() });
            (spelling.prop_map(Text::from), values(0..3))
        };
        let one = (Just(Text::from(single)), values(1..2));
        (prop::option::of(many("a")), prop::option::of(many("b")), prop::option::of(one))
            .prop_map(|(a, b, one)| a.into_iter().chain(b).chain(one).collect())
    }

    fn names(names: &'static [&'static str]) -> impl Strategy<Value = Vec<Text<'static>>> {
        prop::sample::subsequence(names, 0..=names.len()).prop_map(|names| names.into_iter().map(Text::from).collect())
    }

    fn appendable(headers: Headers) -> Headers {
        headers.into_iter().filter(|(name, _)| name.len() == 1).collect()
    }

    prop_compose! {
        fn answers()(
            status in prop::option::weighted(0.3, 400_u16..500),
            removed_request in names(&["A", "b"]),
            set_request in headers("Host"),
            appended_request in headers("Host"),
            removed_response in names(&["a", "B", "Location"]),
            set_response in headers("Location"),
            appended_response in headers("Location"),
            body in prop::option::of(prop_oneof![
                Just(BodyAction::PassThrough),
                Just(BodyAction::Drop),
                "[a-c]".prop_map(|text| BodyAction::Replace(text.into_bytes().into())),
            ]),
            metadata in prop::collection::btree_map("[a-c]", "[x-z]", 0..3),
            tags in prop::collection::vec("[a-c]".prop_map(Text::from), 0..3),
            confidence in prop::option::of(0.0..=1.0),
            needs_more in any::<bool>(),
        ) -> Answer<'static> {
            let decision = status.map_or(Decision::Allow, |status| Decision::Block(BlockStatus::new(status).unwrap().into()));
            let mut answer = AnswerBuilder::new(decision);
            answer.remove_request_headers(removed_request).unwrap();
            answer.set_request_headers(set_request).unwrap().append_request_headers(appendable(appended_request)).unwrap();
            answer.remove_response_headers(removed_response).unwrap();
            answer.set_response_headers(set_response).unwrap().append_response_headers(appendable(appended_response)).unwrap();
            let metadata = metadata.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
            answer.routing_metadata(RoutingMetadata::new(metadata).unwrap()).tags(tags).unwrap().needs_more(needs_more);
            let mut answer = answer.build();
            answer.request_body_mutation = body.map(BodyMutation::from);
            answer.audit.confidence = confidence.map(|confidence| Confidence::new(confidence).unwrap());
            answer
        }
    }

    proptest! {
        #[test]
        fn has_the_effect_of_both(first in answers(), later in answers()) {
            let one_by_one = Outcome::start().then(&first).then(&later);
            prop_assert_eq!(Outcome::start().then(&first.merge(later)), one_by_one);
        }

        #[test]
        fn is_associative(a in answers(), b in answers(), c in answers()) {
            let left = a.clone().merge(b.clone()).merge(c.clone());
            let right = a.merge(b.merge(c));
            prop_assert_eq!(Outcome::start().then(&left), Outcome::start().then(&right));
        }

        #[test]
        fn sets_no_header_twice(first in answers(), later in answers()) {
            let merged = first.merge(later);
            for ops in [&*merged.request_headers, &*merged.response_headers] {
                let mut set: Vec<_> = ops.iter().filter(|op| matches!(op, HeaderOp::Set(..))).map(|op| op.name().to_lowercase()).collect();
                let count = set.len();
                set.sort();
                set.dedup();
                prop_assert_eq!(set.len(), count);
            }
        }

        #[test]
        fn an_allow_changes_nothing(answer in answers()) {
            prop_assert_eq!(&Answer::default().merge(answer.clone()), &answer);
            prop_assert_eq!(&answer.clone().merge(Answer::default()), &answer);
        }

        #[test]
        fn owning_changes_nothing(answer in answers()) {
            prop_assert_eq!(&answer.clone().into_owned(), &answer);
        }
    }

    #[test]
    fn the_first_refusal_ends_the_chain() {
        let block = |body: &'static str| Answer {
            decision: Decision::Block(Block::new(BlockStatus::FORBIDDEN, Some(body.into()))),
            ..Answer::default()
        };
        assert_eq!(block("first").merge(block("later")), block("first"));
        assert_eq!(block("first").merge(Answer::default()), block("first"));
        assert_eq!(Answer::default().merge(block("later")), block("later"));
    }

    #[test]
    fn keeps_the_later_change_of_two_to_different_chunks() {
        let drops = |chunk_index| Answer {
            response_body_mutation: Some(BodyMutation { action: BodyAction::Drop, chunk_index }),
            ..Answer::default()
        };
        assert_eq!(drops(Some(1)).merge(drops(Some(2))), drops(Some(2)));
    }

    #[test]
    fn a_refused_frame_stays_refused() {
        let answer = |decision| Answer { websocket_decision: Some(decision), ..Answer::default() };
        let close = WebsocketDecision::Close { code: CloseCode::POLICY_VIOLATION, reason: CloseReason::from_static("no") };
        for refusal in [WebsocketDecision::Drop, close] {
            for other in [WebsocketDecision::Allow, WebsocketDecision::Drop] {
                assert_eq!(answer(refusal.clone()).merge(answer(other)), answer(refusal.clone()));
            }
            assert_eq!(answer(WebsocketDecision::Allow).merge(answer(refusal.clone())), answer(refusal.clone()));
            assert_eq!(answer(refusal.clone()).merge(Answer::default()), answer(refusal));
        }
    }

    #[test]
    fn a_detection_stays_detected() {
        let answer = |detected, confidence| {
            let verdict = GuardrailVerdict::new(&json!({"detected": detected, "confidence": confidence})).unwrap();
            Answer { guardrail_response: Some(verdict), ..Answer::default() }
        };
        assert_eq!(answer(true, 0.5).merge(answer(false, 0.1)), answer(true, 0.5));
        assert_eq!(answer(true, 0.5).merge(answer(true, 1.0)), answer(true, 0.5));
        assert_eq!(answer(false, 0.5).merge(answer(true, 1.0)), answer(true, 1.0));
        assert_eq!(answer(false, 0.5).merge(answer(false, 0.1)), answer(false, 0.1));
    }
}
