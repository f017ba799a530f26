//! Words for clocks that disagree. Certificates are checked by the wall clock, so a clock that is wrong looks like a bad
//! credential, which it is not; whoever knows both times says so with the amount.

use std::error::Error;
use std::time::Duration;

use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

use crate::pki::{CLOCK_SKEW, CertificateInfo};

/// Clocks that are further apart are told of: certificates are valid from that long before they are issued.
pub const TOLD_FROM: Duration = CLOCK_SKEW;

/// What to tell of this machine's clock and the coordinator's, read at the same time; nothing if they agree well enough.
#[must_use]
pub fn between(ours: Timestamp, theirs: Timestamp) -> Option<String> {
    let (ahead, behind) = (ours.since(theirs), theirs.since(ours));
    let (apart, which) = match ahead > behind {
        true => (ahead, "ahead of"),
        false => (behind, "behind"),
    };
    (apart > TOLD_FROM).then(|| {
        format!(
            "clock skew: this machine's clock ({}) is {} {which} the coordinator's ({}); set the time on both machines \
             (chrony or systemd-timesyncd)",
            ours.utc(),
            rounded(apart),
            theirs.utc()
        )
    })
}

/// When a certificate was issued, by the clock of the coordinator that did it.
#[must_use]
pub fn issued_at(certificate: &CertificateInfo) -> Timestamp {
    certificate.not_before.after(CLOCK_SKEW)
}

/// What a refused certificate of ours comes to if it is a matter of time: it has ended, or the two clocks disagree.
/// Nothing if the failure has another cause.
#[must_use]
pub fn refused(certificate: &CertificateInfo, error: &dyn Error, now: Timestamp) -> Option<String> {
    let (from, to) = (certificate.not_before, certificate.not_after);
    if !says_expired(error) {
        return None;
    }
    Some(if to <= now {
        format!("the certificate ended at {}; enrol again", to.utc())
    } else if now < from {
        format!(
            "clock skew: this machine's clock ({}) is at least {} behind: the certificate is valid from {}; set the time \
             (chrony or systemd-timesyncd)",
            now.utc(),
            rounded(from.since(now)),
            from.utc()
        )
    } else {
        format!(
            "clock skew: the coordinator holds the certificate for expired or not valid yet, but by this machine's clock \
             ({}) it is valid from {} to {}; set the time on both machines (chrony or systemd-timesyncd)",
            now.utc(),
            from.utc(),
            to.utc()
        )
    })
}

/// Whether the peer ended the handshake with the alert that it sends for a certificate outside its time. By its text, as
/// HTTP/2 keeps no more of it.
#[must_use]
pub fn says_expired(error: &dyn Error) -> bool {
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
    let (mut next, alert) = (Some(error), alert.to_string());
    while let Some(error) = next {
        if error.to_string().contains(&alert) {
            return true;
        }
        next = error.source();
    }
    false
}

/// To the second, as nobody needs more.
fn rounded(apart: Duration) -> String {
    format_duration(Duration::from_secs(apart.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;
    use crate::testing::Cluster;

    const NOW: Timestamp = Timestamp(1_700_000_000_000);
    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn clocks_that_disagree_are_told_of_with_the_amount_and_the_direction() {
        assert_eq!(between(NOW, NOW), None);
        assert_eq!(between(NOW.after(TOLD_FROM), NOW), None);
        let ahead = between(NOW.after(HOUR), NOW).expect("an hour is much");
        assert!(
            ahead.starts_with(
                "clock skew: this machine's clock (2023-11-14 23:13:20 UTC) is 1h ahead of the coordinator's \
                 (2023-11-14 22:13:20 UTC)"
            ),
            "{ahead}"
        );
        let behind = between(NOW, NOW.after(HOUR)).expect("an hour is much");
        assert!(
            behind.contains("is 1h behind the coordinator's"),
            "{behind}"
        );
    }

    #[test]
    fn a_refused_certificate_is_a_matter_of_time_only_if_the_peer_says_so() {
        let cluster = Cluster::new();
        let (cert, _) = cluster.issue(&Identity::Node(trainyard_common::ids::NodeId(7)), NOW);
        let info = crate::pki::inspect_pem(&cert).expect("it is ours");
        assert_eq!(issued_at(&info), NOW);
        let alert = |alert| std::io::Error::other(rustls::Error::AlertReceived(alert));
        let unknown = alert(rustls::AlertDescription::UnknownCA);
        assert_eq!(refused(&info, &unknown, NOW), None);
        let expired = alert(rustls::AlertDescription::CertificateExpired);
        let told = |now| refused(&info, &expired, now).expect("it is a matter of time");
        assert!(told(info.not_after).contains("ended at"));
        let early = told(Timestamp(info.not_before.0 - 7_200_000));
        assert!(early.contains("is at least 2h behind"), "{early}");
        let valid = told(NOW);
        assert!(
            valid.starts_with("clock skew: the coordinator holds"),
            "{valid}"
        );
    }
}
