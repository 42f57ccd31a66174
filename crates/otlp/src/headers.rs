//! Headers for a collector, for example with a token.

use std::str::FromStr;

use hyper::HeaderMap;
use hyper::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue, TRANSFER_ENCODING};

use crate::endpoint::InvalidOption;

/// Headers that the client sets.
const OWN: [HeaderName; 5] = [CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TRANSFER_ENCODING];

/// Headers of every request, in the format of `OTEL_EXPORTER_OTLP_HEADERS`: `name=value` pairs,
/// separated by commas, with percent-encoded values. Their values are not shown by `Debug`.
#[derive(Clone, Debug, Default)]
pub struct Headers(pub(crate) HeaderMap);

impl FromStr for Headers {
    type Err = InvalidOption;

    fn from_str(text: &str) -> Result<Self, InvalidOption> {
        // The message does not have the value, which may be a secret.
        const EXPECTED: InvalidOption = InvalidOption("expected `name=value` pairs, separated by commas, with percent-encoded values");

        let mut headers = HeaderMap::new();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or(EXPECTED)?;
            let name: HeaderName = name.trim().parse().map_err(|_| EXPECTED)?;
            if OWN.contains(&name) {
                return Err(InvalidOption("`Connection`, `Host`, and the headers of the body are set by the agent"));
            }
            let mut value = HeaderValue::from_bytes(&percent_decoded(value.trim()).ok_or(EXPECTED)?).map_err(|_| EXPECTED)?;
            value.set_sensitive(true);
            headers.append(name, value);
        }
        Ok(Self(headers))
    }
}

/// Decodes `%` and two hexadecimal digits. `None` if they are not.
pub(crate) fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        decoded.push(match byte {
            b'%' => {
                let [high, low] = [rest.next()?, rest.next()?].map(|digit| char::from(digit).to_digit(16));
                (high? << 4 | low?) as u8
            }
            byte => byte,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_pairs_with_percent_encoded_values() {
        let Headers(headers) = "Authorization=Bearer%20a%3Db=, x-tenant = one ,".parse().unwrap();
        assert_eq!(
            (headers.len(), &headers["authorization"], &headers["x-tenant"]),
            (2, &"Bearer a=b=".parse().unwrap(), &"one".parse().unwrap())
        );
        assert!("".parse::<Headers>().unwrap().0.is_empty());
    }

    #[test]
    fn do_not_show_their_values() {
        let headers: Headers = "authorization=secret".parse().unwrap();
        assert!(!format!("{headers:?}").contains("secret"), "{headers:?}");
        for invalid in ["secret", "=secret", "a b=secret", "a=secret%", "a=secret%x1", "a=secret%0a"] {
            let error = invalid.parse::<Headers>().unwrap_err().to_string();
            assert!(error.starts_with("expected `name=value` pairs") && !error.contains("secret"), "{error}");
        }
        assert!("Host=secret".parse::<Headers>().unwrap_err().to_string().contains("set by the agent"));
    }
}
