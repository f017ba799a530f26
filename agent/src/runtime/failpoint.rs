//! Places between two steps at which tests end the agent's process, to see what the next one makes of it. In a build that
//! is no test they are nothing.

/// The process ends here if a test wants that.
#[cfg(not(test))]
pub(super) const fn point(_name: &'static str) {}

#[cfg(test)]
pub(super) use self::armed::{POINTS, VARIABLE, point};

#[cfg(test)]
mod armed {
    /// Names the place. It reaches the agent of a test only: shims are given no variables but a few.
    pub(crate) const VARIABLE: &str = "TRAINYARD_TEST_FAIL_POINT";
    /// All places; a test goes through them.
    pub(crate) const POINTS: [&str; 19] = [
        "attempt.begin",
        "attempt.made",
        "attempt.filled",
        "attempt.named",
        "attempt.synced",
        "shim.log",
        "shim.forked",
        "shim.followed",
        "member.telling",
        "member.told",
        "unstarted.locked",
        "unstarted.written",
        "bundle.begin",
        "bundle.filled",
        "bundle.named",
        "bundle.synced",
        "bundle.telling",
        "bundle.told",
        "settle.appended",
    ];

    pub(crate) fn point(name: &'static str) {
        assert!(POINTS.contains(&name), "{name} is not in the list");
        if std::env::var_os(VARIABLE).is_some_and(|wanted| wanted == name) {
            let own = nix::unistd::getpid();
            let _ = nix::sys::signal::kill(own, nix::sys::signal::Signal::SIGKILL);
        }
    }
}
