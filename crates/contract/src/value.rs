//! Untrusted JSON of arbitrary shape.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// A value that consists of at most `MAX` values, counting itself and the keys of objects. A few
/// bytes of text become half a kilobyte in memory.
///
/// Untrusted input is not deserialized to a [`Value`] by serde_json itself, for two reasons: it has
/// no bound; and with the feature `raw_value`, which any crate of the build may enable, it parses
/// the text under a certain key as JSON again, to any depth.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bounded<const MAX: usize>(pub Value);

impl<'de, const MAX: usize> Deserialize<'de> for Bounded<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut left = MAX;
        Budget { left: &mut left, max: MAX }.deserialize(deserializer).map(Self)
    }
}

/// Reads a value while the budget lasts.
struct Budget<'a> {
    left: &'a mut usize,
    max: usize,
}

impl Budget<'_> {
    fn take<E: Error>(&mut self) -> Result<(), E> {
        *self.left = self.left.checked_sub(1).ok_or_else(|| E::custom(format_args!("more than {} values", self.max)))?;
        Ok(())
    }

    fn inner(&mut self) -> Budget<'_> {
        Budget { left: self.left, max: self.max }
    }
}

impl<'de> DeserializeSeed<'de> for Budget<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(mut self, deserializer: D) -> Result<Value, D::Error> {
        self.take()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Budget<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element_seed(self.inner())? {
            list.push(entry);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.take()?;
            let value = entries.next_value_seed(self.inner())?;
            if object.insert(key, value).is_some() {
                return Err(Error::custom("a key is repeated in an object"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    type Some100 = Bounded<100>;

    #[test]
    fn rejects_more_values_than_the_bound() {
        let list = |len: usize| format!("[{}0]", "0,".repeat(len - 1));
        assert!(serde_json::from_str::<Some100>(&list(99)).is_ok());
        let error = serde_json::from_str::<Some100>(&list(100)).unwrap_err().to_string();
        assert!(error.contains("more than 100 values"), "{error}");
        serde_json::from_str::<Some100>(&format!("[{}0]", "{\"\":0},".repeat(50))).unwrap_err();
        serde_json::from_str::<Some100>(r#"{"a":1,"a":2}"#).unwrap_err();
    }

    #[test]
    fn a_key_that_serde_json_treats_as_raw_text_is_a_key() {
        let key = "$serde_json::private::RawValue";
        let value: Some100 = serde_json::from_str(&format!(r#"{{"{key}":"[1]"}}"#)).unwrap();
        assert_eq!(value.0, json!({key: "[1]"}));
        let mut packed = vec![0x81, 0xa0 | key.len() as u8];
        packed.extend(key.bytes());
        packed.extend(b"\xa3[1]");
        assert_eq!(rmp_serde::from_slice::<Some100>(&packed).unwrap().0, json!({key: "[1]"}));
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            prop::num::f64::NORMAL.prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 60, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..5).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn reads_values_like_serde_json(value in values()) {
            let text = value.to_string();
            let read: Bounded<1000> = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&read.0, &serde_json::from_str::<Value>(&text).unwrap());
            let packed = rmp_serde::to_vec_named(&value).unwrap();
            let read: Bounded<1000> = rmp_serde::from_slice(&packed).unwrap();
            prop_assert_eq!(read.0, rmp_serde::from_slice::<Value>(&packed).unwrap());
        }
    }
}
