//! Groups the headers of a message by name.

use std::borrow::Cow;

use hashbrown::HashMap;
use zentinel_wasm_contract::Text;
use zentinel_wasm_contract::event::{HeaderValues, Headers};

use super::proto;

/// Number of headers up to which a linear search is faster than a map.
const FEW_HEADERS: usize = 32;

/// Groups a list of headers.
pub(super) fn grouped(list: &[proto::Header]) -> Headers<'_> {
    let mut headers = HeaderGroups::default();
    for header in list {
        headers.push(&header.name, &header.value);
    }
    headers.finish()
}

/// Headers, grouped by name in the order of their first values.
#[derive(Default)]
pub(super) struct HeaderGroups<'a> {
    headers: Vec<(Text<'a>, HeaderValues<'a>)>,
    /// Position of each name in `headers`. Used for many headers, because a client must not make
    /// the agent compare each with each.
    places: HashMap<&'a str, usize>,
    values: usize,
}

impl<'a> HeaderGroups<'a> {
    pub(super) fn push(&mut self, name: &'a str, value: &'a str) {
        self.values += 1;
        let known = if self.headers.len() < FEW_HEADERS {
            self.headers.iter().position(|(known, _)| known.as_str() == name)
        } else {
            self.place(name)
        };
        match known {
            Some(place) => self.headers[place].1.push(value.into()),
            None => {
                if self.headers.is_empty() {
                    self.headers.reserve(FEW_HEADERS / 2);
                }
                self.headers.push((name.into(), HeaderValues::One(value.into())));
            }
        }
    }

    /// Position of a name. Adds a new name to the map with the position that it will have.
    fn place(&mut self, name: &'a str) -> Option<usize> {
        if self.places.is_empty() {
            for (place, (known, _)) in self.headers.iter().enumerate() {
                if let Text(Cow::Borrowed(known)) = known {
                    self.places.insert(known, place);
                }
            }
        }
        let place = *self.places.entry(name).or_insert(self.headers.len());
        (place < self.headers.len()).then_some(place)
    }

    /// Number of values that were added.
    pub(super) fn len(&self) -> usize {
        self.values
    }

    pub(super) fn finish(self) -> Headers<'a> {
        Headers(self.headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, value: &str) -> proto::Header {
        proto::Header { name: name.into(), value: value.into() }
    }

    fn grouped(list: &[proto::Header]) -> Vec<(String, Vec<String>)> {
        let Headers(headers) = super::grouped(list);
        headers.iter().map(|(name, values)| (name.to_string(), values.as_slice().iter().map(Text::to_string).collect())).collect()
    }

    #[test]
    fn groups_values_by_name() {
        let list = [header("accept", "a"), header("host", "h"), header("accept", "b")];
        assert_eq!(grouped(&list), [("accept".into(), vec!["a".into(), "b".into()]), ("host".into(), vec!["h".into()])]);
    }

    #[test]
    fn groups_many_headers() {
        let list: Vec<_> = (0..100).map(|at| header(&format!("x-{}", at % 50), &at.to_string())).collect();
        let headers = grouped(&list);
        assert_eq!(headers.len(), 50);
        assert_eq!(headers[40], ("x-40".into(), vec!["40".into(), "90".into()]));
    }
}
