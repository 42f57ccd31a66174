//! Puts an answer together.

use super::Answer;
use super::audit::Confidence;
use super::body::BodyMutation;
use super::decision::Decision;
use super::error::AnswerError;
use super::guardrail::GuardrailVerdict;
use super::printable::Printable;
use super::routing::RoutingMetadata;
use super::websocket::WebsocketDecision;
use crate::text::Text;

/// Puts an [`Answer`] together from unchecked parts.
///
/// It is given the decision first, because a block's response carries its headers itself: what the
/// answer sets or appends in the response goes there.
///
/// ```
/// use zentinel_wasm_contract::{AnswerBuilder, Block, BlockStatus, Decision};
///
/// let mut answer = AnswerBuilder::new(Decision::Block(Block::new(BlockStatus::new(429)?, None)));
/// answer.set_response_headers(vec![("Retry-After".into(), vec!["5".into()])])?.tags(vec!["busy".into()])?;
/// let error = answer.set_request_headers(vec![("Upgrade".into(), vec!["h2c".into()])]).unwrap_err();
/// assert_eq!(error.to_string(), "`Upgrade` frames the message, so only the proxy may set it");
///
/// let answer = answer.build();
/// let Decision::Block(block) = answer.decision else { unreachable!() };
/// assert_eq!(block.headers()[0].1.as_str(), "5");
/// # Ok::<_, zentinel_wasm_contract::AnswerError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnswerBuilder<'a>(Answer<'a>);

impl<'a> AnswerBuilder<'a> {
    /// An answer that consists of a decision alone.
    #[inline]
    pub fn new(decision: Decision<'a>) -> Self {
        Self(Answer { decision, ..Answer::default() })
    }

    /// Removes headers of the request.
    ///
    /// # Errors
    ///
    /// As for [`RequestChanges::remove`](super::RequestChanges::remove).
    pub fn remove_request_headers(&mut self, names: Vec<Text<'a>>) -> Result<&mut Self, AnswerError> {
        self.0.request_headers.remove(names)?;
        Ok(self)
    }

    /// Sets headers of the request.
    ///
    /// # Errors
    ///
    /// As for [`RequestChanges::set`](super::RequestChanges::set).
    pub fn set_request_headers(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<&mut Self, AnswerError> {
        self.0.request_headers.set(headers)?;
        Ok(self)
    }

    /// Appends headers to those of the request.
    ///
    /// # Errors
    ///
    /// As for [`RequestChanges::append`](super::RequestChanges::append).
    pub fn append_request_headers(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<&mut Self, AnswerError> {
        self.0.request_headers.append(headers)?;
        Ok(self)
    }

    /// Removes headers of the upstream's response.
    ///
    /// # Errors
    ///
    /// As for [`ResponseChanges::remove`](super::ResponseChanges::remove).
    pub fn remove_response_headers(&mut self, names: Vec<Text<'a>>) -> Result<&mut Self, AnswerError> {
        self.0.response_headers.remove(names)?;
        Ok(self)
    }

    /// Sets headers of the response: a block's own, else the upstream's.
    ///
    /// # Errors
    ///
    /// As for [`BlockHeaders::set`](super::BlockHeaders::set) and
    /// [`ResponseChanges::set`](super::ResponseChanges::set).
    pub fn set_response_headers(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<&mut Self, AnswerError> {
        match &mut self.0.decision {
            Decision::Block(block) => block.headers_mut().set(headers)?,
            _ => self.0.response_headers.set(headers)?,
        }
        Ok(self)
    }

    /// Appends headers to those of the response: a block's own, else the upstream's.
    ///
    /// # Errors
    ///
    /// As for [`BlockHeaders::append`](super::BlockHeaders::append) and
    /// [`ResponseChanges::append`](super::ResponseChanges::append).
    pub fn append_response_headers(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<&mut Self, AnswerError> {
        match &mut self.0.decision {
            Decision::Block(block) => block.headers_mut().append(headers)?,
            _ => self.0.response_headers.append(headers)?,
        }
        Ok(self)
    }

    /// Sets the tags of the audit log.
    ///
    /// # Errors
    ///
    /// A tag contains control characters.
    pub fn tags(&mut self, tags: Vec<Text<'a>>) -> Result<&mut Self, AnswerError> {
        self.0.audit.tags = Printable::list(tags)?;
        Ok(self)
    }

    /// Sets the rules that matched.
    ///
    /// # Errors
    ///
    /// An id contains control characters.
    pub fn rule_ids(&mut self, rule_ids: Vec<Text<'a>>) -> Result<&mut Self, AnswerError> {
        self.0.audit.rule_ids = Printable::list(rule_ids)?;
        Ok(self)
    }

    /// Sets the structured reasons.
    ///
    /// # Errors
    ///
    /// A code contains control characters.
    pub fn reason_codes(&mut self, reason_codes: Vec<Text<'a>>) -> Result<&mut Self, AnswerError> {
        self.0.audit.reason_codes = Printable::list(reason_codes)?;
        Ok(self)
    }

    /// Sets how sure the module is.
    pub fn confidence(&mut self, confidence: Confidence) -> &mut Self {
        self.0.audit.confidence = Some(confidence);
        self
    }

    /// Sets the hints for the choice of an upstream.
    pub fn routing_metadata(&mut self, metadata: RoutingMetadata<'a>) -> &mut Self {
        self.0.routing_metadata = metadata;
        self
    }

    /// Sets whether the module wants to see more of the body before it decides.
    pub fn needs_more(&mut self, needs_more: bool) -> &mut Self {
        self.0.needs_more = needs_more;
        self
    }

    /// Sets what happens to a chunk of the request body.
    pub fn request_body_mutation(&mut self, mutation: BodyMutation<'a>) -> &mut Self {
        self.0.request_body_mutation = Some(mutation);
        self
    }

    /// Sets what happens to a chunk of the response body.
    pub fn response_body_mutation(&mut self, mutation: BodyMutation<'a>) -> &mut Self {
        self.0.response_body_mutation = Some(mutation);
        self
    }

    /// Sets what happens to a WebSocket frame.
    pub fn websocket_decision(&mut self, decision: WebsocketDecision<'a>) -> &mut Self {
        self.0.websocket_decision = Some(decision);
        self
    }

    /// Sets the verdict of a guardrail inspection.
    pub fn guardrail_response(&mut self, verdict: GuardrailVerdict) -> &mut Self {
        self.0.guardrail_response = Some(verdict);
        self
    }

    /// The answer.
    #[inline]
    pub fn build(self) -> Answer<'a> {
        self.0
    }
}
