//! This machine's name, which nodes, locks and endpoints are called by. It must not know what for.

/// The host name, if there is one that is text.
#[must_use]
pub fn name() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}
