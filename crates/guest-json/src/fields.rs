//! The JSON object of an answer: its types are right, its values are not checked yet.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use zentinel_wasm_contract::limits::MAX_VERDICT_VALUES;
use zentinel_wasm_contract::text::Object;
use zentinel_wasm_contract::{Bounded, Pairs, Text};

/// The fields of an answer. Unknown ones are ignored; one that is `null` counts as absent.
#[derive(Default, Deserialize)]
#[serde(default, bound(deserialize = "'de: 'a"))]
pub(crate) struct AnswerFields<'a> {
    pub(crate) decision: Option<Text<'a>>,
    pub(crate) status: Option<u16>,
    pub(crate) body: Option<Text<'a>>,
    pub(crate) add_request_headers: Option<Pairs<'a, Values<'a>>>,
    pub(crate) remove_request_headers: Option<Vec<Text<'a>>>,
    pub(crate) append_request_headers: Option<Pairs<'a, Values<'a>>>,
    pub(crate) add_response_headers: Option<Pairs<'a, Values<'a>>>,
    pub(crate) remove_response_headers: Option<Vec<Text<'a>>>,
    pub(crate) append_response_headers: Option<Pairs<'a, Values<'a>>>,
    pub(crate) tags: Option<Vec<Text<'a>>>,
    pub(crate) rule_ids: Option<Vec<Text<'a>>>,
    pub(crate) confidence: Option<f64>,
    pub(crate) reason_codes: Option<Vec<Text<'a>>>,
    pub(crate) challenge_type: Option<Text<'a>>,
    pub(crate) challenge_params: Option<Pairs<'a, Scalar<'a>>>,
    pub(crate) routing_metadata: Option<Pairs<'a, Text<'a>>>,
    pub(crate) needs_more: Option<bool>,
    pub(crate) request_body_mutation: Option<Object<MutationFields<'a>>>,
    pub(crate) response_body_mutation: Option<Object<MutationFields<'a>>>,
    pub(crate) websocket_decision: Option<WebsocketFields<'a>>,
    pub(crate) guardrail_response: Option<Bounded<MAX_VERDICT_VALUES>>,
}

/// The fields of a body mutation.
#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub(crate) struct MutationFields<'a> {
    pub(crate) action: Option<Text<'a>>,
    pub(crate) chunk_index: Option<u32>,
    pub(crate) data: Option<Text<'a>>,
    pub(crate) data_base64: Option<Text<'a>>,
}

/// A WebSocket decision: a word, or the fields of a close.
pub(crate) enum WebsocketFields<'a> {
    Named(Text<'a>),
    Close { code: u16, reason: Option<Text<'a>> },
}

/// One header value or a list of them.
pub(crate) struct Values<'a>(pub(crate) Vec<Text<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Values<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValuesVisitor;

        impl<'de> Visitor<'de> for ValuesVisitor {
            type Value = Values<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_borrowed_str<E: Error>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Values(vec![Text::from(value)]))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Values(vec![Text::from(value.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = seq.next_element()? {
                    values.push(value);
                }
                Ok(Values(values))
            }
        }

        deserializer.deserialize_any(ValuesVisitor)
    }
}

/// A string, number or boolean, as the text that the protocol carries.
pub(crate) struct Scalar<'a>(pub(crate) Text<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Scalar<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;

        impl<'de> Visitor<'de> for ScalarVisitor {
            type Value = Scalar<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a number or a boolean")
            }

            fn visit_borrowed_str<E: Error>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value)))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_owned())))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_string())))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_string())))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_string())))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
                serde_json::Number::from_f64(value)
                    .map(|number| Scalar(Text::from(number.to_string())))
                    .ok_or_else(|| E::custom("not a finite number"))
            }
        }

        deserializer.deserialize_any(ScalarVisitor)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for WebsocketFields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(bound(deserialize = "'de: 'a"))]
        struct Close<'a> {
            code: u16,
            reason: Option<Text<'a>>,
        }

        struct WebsocketVisitor;

        impl<'de> Visitor<'de> for WebsocketVisitor {
            type Value = WebsocketFields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`allow`, `drop` or an object with `close`")
            }

            fn visit_borrowed_str<E: Error>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(WebsocketFields::Named(Text::from(value)))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(WebsocketFields::Named(Text::from(value.to_owned())))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut close = None;
                while let Some(key) = map.next_key::<Text<'de>>()? {
                    if &*key == "close" {
                        if close.is_some() {
                            return Err(A::Error::duplicate_field("close"));
                        }
                        close = Some(map.next_value::<Object<Close<'de>>>()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                match close {
                    Some(Object(Close { code, reason })) => Ok(WebsocketFields::Close { code, reason }),
                    None => Err(A::Error::missing_field("close")),
                }
            }
        }

        deserializer.deserialize_any(WebsocketVisitor)
    }
}
