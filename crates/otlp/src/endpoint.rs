//! Where a collector is.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use hyper::http::uri::Scheme;

/// An invalid value of an option: what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidOption(pub(crate) &'static str);

/// The address of a collector that takes OTLP over HTTP, as in `OTEL_EXPORTER_OTLP_ENDPOINT`: the
/// paths of the signals are appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Whether connections use TLS.
    pub is_tls: bool,
    /// Name or address of the host, without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Host and port as in the URL, for the `Host` header.
    pub(crate) authority: String,
    /// Path without a slash at its end.
    path: String,
}

impl Endpoint {
    /// The path of requests with one signal, such as `traces`.
    pub(crate) fn path_of(&self, signal: &str) -> String {
        format!("{}/v1/{signal}", self.path)
    }
}

impl FromStr for Endpoint {
    type Err = InvalidOption;

    fn from_str(text: &str) -> Result<Self, InvalidOption> {
        const EXPECTED: InvalidOption =
            InvalidOption("expected the URL of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318");

        let uri: Uri = text.parse().map_err(|_| EXPECTED)?;
        let is_tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err(EXPECTED),
        };
        let authority = uri.authority().ok_or(EXPECTED)?.as_str();
        if authority.contains('@') {
            return Err(InvalidOption("a URL with a user or password is not supported: use `--otlp-headers`"));
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(InvalidOption("a URL with a query or fragment is not supported: `/v1/traces` is appended to its path"));
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or(EXPECTED)?;
        let port = match uri.port_u16() {
            Some(port) => port,
            // `Uri` takes a port that is not a number for none.
            None if authority.len() > host.len() => return Err(EXPECTED),
            None => [80, 443][usize::from(is_tls)],
        };
        Ok(Self {
            is_tls,
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port,
            authority: authority.to_owned(),
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_host_port_and_paths() {
        for (url, is_tls, host, port, traces) in [
            ("http://127.0.0.1:4318", false, "127.0.0.1", 4318, "/v1/traces"),
            ("http://collector", false, "collector", 80, "/v1/traces"),
            ("https://otel.example.org/", true, "otel.example.org", 443, "/v1/traces"),
            ("http://[::1]:4318/api/v1/otlp/", false, "::1", 4318, "/api/v1/otlp/v1/traces"),
        ] {
            let endpoint: Endpoint = url.parse().unwrap();
            assert_eq!((endpoint.is_tls, &*endpoint.host, endpoint.port), (is_tls, host, port), "{url}");
            assert_eq!(endpoint.path_of("traces"), traces);
            assert_eq!(endpoint.to_string(), url.trim_end_matches('/'));
        }
    }

    #[test]
    fn rejects_other_urls() {
        for url in ["", "127.0.0.1:4318", "/v1/traces", "grpc://127.0.0.1:4317", "http://", "http://:1", "http://a:b", "http://a:99999"] {
            assert!(url.parse::<Endpoint>().unwrap_err().to_string().starts_with("expected the URL"), "{url}");
        }
        assert!("http://user:secret@a:1".parse::<Endpoint>().unwrap_err().to_string().contains("--otlp-headers"));
        assert!("http://a:1/?x".parse::<Endpoint>().unwrap_err().to_string().contains("query"));
        assert!("http://a:1/#x".parse::<Endpoint>().unwrap_err().to_string().contains("query or fragment"));
    }
}
