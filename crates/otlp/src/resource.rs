//! Describes the process that spans and metrics come from.

use crate::headers::percent_decoded;
use crate::ids::Ids;
use crate::proto::KeyValue;
use crate::proto::Resource;
use crate::proto::text;

/// What the environment says about the process, in the variables that OpenTelemetry defines.
#[derive(Clone, Debug, Default)]
pub struct ResourceEnvironment {
    /// `OTEL_SERVICE_NAME`: `zentinel-wasm-agent` by default.
    pub service_name: Option<String>,
    /// `OTEL_RESOURCE_ATTRIBUTES`: `name=value` pairs, separated by commas, with percent-encoded
    /// values.
    pub attributes: Option<String>,
}

impl ResourceEnvironment {
    /// Reads the variables of this process.
    pub fn read() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { service_name: variable("OTEL_SERVICE_NAME"), attributes: variable("OTEL_RESOURCE_ATTRIBUTES") }
    }

    /// The resource. Attributes of the environment take precedence.
    pub(crate) fn resource(&self, ids: &mut Ids) -> Resource {
        let given = self.attributes.as_deref().unwrap_or_default().split(',').filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            let value = String::from_utf8(percent_decoded(value.trim())?).ok()?;
            Some(text(name.trim(), value))
        });
        let mut attributes: Vec<KeyValue> = self.service_name.iter().map(|name| text("service.name", name)).collect();
        let own = [
            text("service.name", "zentinel-wasm-agent"),
            text("service.version", env!("CARGO_PKG_VERSION")),
            // Distinguishes the metrics of several agents, and of one before and after a restart.
            text("service.instance.id", format!("{:032x}", u128::from_be_bytes(ids.trace()))),
        ];
        for attribute in given.chain(own) {
            if !attributes.iter().any(|known| known.key == attribute.key) {
                attributes.push(attribute);
            }
        }
        Resource { attributes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::any_value::Value;

    fn attributes(environment: &ResourceEnvironment) -> Vec<(String, String)> {
        let Resource { attributes, .. } = environment.resource(&mut Ids::new());
        let text = |attribute: KeyValue| match attribute.value.unwrap().value.unwrap() {
            Value::StringValue(text) => (attribute.key, text),
            other => panic!("{other:?}"),
        };
        attributes.into_iter().map(text).collect()
    }

    #[test]
    fn names_the_service_and_its_instance() {
        let names: Vec<_> = attributes(&ResourceEnvironment::default()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["service.name", "service.version", "service.instance.id"]);
    }

    #[test]
    fn follows_the_environment() {
        let environment = ResourceEnvironment {
            service_name: Some("edge".into()),
            attributes: Some("service.name=other,service.instance.id=pod-1, k8s.pod.name=a%20b ,broken,x=%".into()),
        };
        let expected = [
            ("service.name", "edge"),
            ("service.instance.id", "pod-1"),
            ("k8s.pod.name", "a b"),
            ("service.version", env!("CARGO_PKG_VERSION")),
        ];
        assert_eq!(attributes(&environment), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
