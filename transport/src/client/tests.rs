//! What a client accepts and refuses, against real servers on loopback.

use std::slice;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;

use super::*;
use crate::identity::Identity;
use crate::pki::{LEAF_VALIDITY, ServerCert};
use crate::server::{ServerLimits, ServerTls};
use crate::testing::{Cluster, Server, listener, long_ago, node, now, soon};

async fn try_dial(endpoints: &[Endpoint], trust: &Trust) -> Result<(), ConnectError> {
    let dialer = Dialer::new(endpoints, trust, None)?;
    soon("the connection", dialer.dial()).await.map(drop)
}

/// What `dial` says about a server that presents `cert` when the client trusts `cluster` in either way.
async fn failures_with(cluster: &Cluster, cert: &ServerCert) -> Vec<ConnectError> {
    let tls = ServerTls::new(cluster.authority.cert_pem(), cert).unwrap();
    let server = Server::start(tls, ServerLimits::default()).await;
    let mut errors = Vec::new();
    for trust in [cluster.trust(), cluster.trust_hash()] {
        errors.push(
            try_dial(slice::from_ref(&server.endpoint), &trust)
                .await
                .unwrap_err(),
        );
    }
    errors
}

fn only(error: &ConnectError) -> &EndpointFailure {
    match error {
        ConnectError::Failed { failures } if failures.len() == 1 => &failures[0].1,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn both_kinds_of_trust_accept_the_coordinator() {
    let cluster = Cluster::new();
    let server = cluster.serve().await;
    for trust in [cluster.trust(), cluster.trust_hash()] {
        try_dial(slice::from_ref(&server.endpoint), &trust)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn attack_b11_another_authority_is_a_ca_mismatch() {
    let cluster = Cluster::new();
    // The same cluster id, so that only the authority differs.
    let other = Cluster::new();
    for error in failures_with(&cluster, &other.server_cert()).await {
        assert!(
            matches!(error, ConnectError::CaMismatch { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("CA hash mismatch"), "{error}");
        assert!(!error.is_unreachable());
    }
}

#[tokio::test]
async fn attack_b11_sending_the_true_authority_beside_a_false_leaf_does_not_help() {
    let cluster = Cluster::new();
    let mut cert = Cluster::new().server_cert();
    let leaf = cert
        .chain_pem
        .split_inclusive("-----END CERTIFICATE-----\n")
        .next()
        .unwrap();
    cert.chain_pem = format!("{leaf}{}", cluster.authority.cert_pem());
    for error in failures_with(&cluster, &cert).await {
        assert!(
            matches!(error, ConnectError::CaMismatch { .. }),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_node_or_user_cannot_pose_as_the_coordinator() {
    let cluster = Cluster::new();
    for identity in [node(7), Identity::User("anna".parse().unwrap())] {
        let (pem, key_pem) = cluster.issue(&identity, now());
        let chain_pem = format!("{pem}{}", cluster.authority.cert_pem());
        let cert = ServerCert {
            chain_pem,
            key_pem,
            not_after: now(),
        };
        for error in failures_with(&cluster, &cert).await {
            assert!(
                matches!(only(&error), EndpointFailure::NotCoordinator),
                "{error:?}"
            );
        }
    }
}

#[tokio::test]
async fn the_coordinator_of_another_cluster_is_refused_even_with_this_authority() {
    let cluster = Cluster::new();
    let server = cluster.serve().await;
    let trust = Trust::Ca {
        ca_pem: cluster.authority.cert_pem().to_owned(),
        cluster: ClusterId([9; 16]),
    };
    let error = try_dial(&[server.endpoint], &trust).await.unwrap_err();
    assert!(
        matches!(only(&error), EndpointFailure::NotCoordinator),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_expired_server_certificate_points_to_the_clocks() {
    let cluster = Cluster::new();
    let cert = cluster
        .authority
        .issue_server(&[], LEAF_VALIDITY, long_ago())
        .unwrap();
    for error in failures_with(&cluster, &cert).await {
        assert!(
            matches!(
                only(&error),
                EndpointFailure::CertificateTime(CertificateTime::Ended { .. })
            ),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(text.contains("clock skew? check the clocks"), "{text}");
        assert!(text.contains("and this machine's clock says 20"), "{text}");
    }
}

#[tokio::test]
async fn a_clock_that_is_behind_is_told_as_that_with_the_amount() {
    let cluster = Cluster::new();
    let ahead = now().after(Duration::from_secs(7200));
    let cert = cluster
        .authority
        .issue_server(&[], LEAF_VALIDITY, ahead)
        .unwrap();
    for error in failures_with(&cluster, &cert).await {
        let text = error.to_string();
        assert!(
            matches!(
                only(&error),
                EndpointFailure::CertificateTime(CertificateTime::NotBegun { .. })
            ),
            "{error:?}"
        );
        // Certificates are valid from five minutes before they are issued.
        assert!(text.contains("1h 54m") || text.contains("1h 55m"), "{text}");
        assert!(text.contains("earlier"), "{text}");
    }
}

#[tokio::test]
async fn a_certificate_that_the_server_holds_for_expired_is_told_apart_from_a_broken_connection() {
    use trainyard_proto::v1::RenewRequest;
    use trainyard_proto::v1::enroll_service_client::EnrollServiceClient;

    let cluster = Cluster::new();
    let server = cluster.serve().await;
    let (cert, key) = cluster.issue(&node(7), long_ago());
    let expired = ClientCert::new(&cert, &key).unwrap();
    let endpoints = slice::from_ref(&server.endpoint);
    let asked = async {
        let channel = connect(endpoints, &cluster.trust(), Some(&expired)).await;
        let mut client = match channel {
            Ok(channel) => EnrollServiceClient::new(channel),
            Err(error) => return Box::new(error) as Box<dyn std::error::Error>,
        };
        let request = RenewRequest {
            certificate_request: String::new(),
        };
        Box::new(client.renew(request).await.unwrap_err())
    };
    let error = soon("the refusal", asked).await;
    assert!(crate::skew::says_expired(error.as_ref()), "{error:?}");
    assert!(
        crate::skew::refused(&expired.info(), error.as_ref(), now())
            .is_some_and(|told| told.starts_with("the certificate ended at"))
    );
}

#[tokio::test]
async fn a_chain_of_twenty_is_refused() {
    let cluster = Cluster::new();
    let mut cert = cluster.server_cert();
    cert.chain_pem
        .push_str(&cluster.authority.cert_pem().repeat(20));
    for error in failures_with(&cluster, &cert).await {
        assert!(matches!(only(&error), EndpointFailure::Tls(_)), "{error:?}");
    }
}

#[tokio::test]
async fn nobody_there_and_no_tls_are_told_apart() {
    let trust = Cluster::new().trust();
    let (gone, closed) = listener().await;
    drop(gone);
    let error = try_dial(slice::from_ref(&closed), &trust)
        .await
        .unwrap_err();
    assert!(
        matches!(only(&error), EndpointFailure::Refused),
        "{error:?}"
    );
    assert!(error.is_unreachable());
    assert!(error.to_string().contains(&closed.to_string()), "{error}");

    let (http, endpoint) = listener().await;
    let answer = crate::task::AbortOnDrop(crate::task::spawn("http", answer_http(http)));
    let error = try_dial(&[endpoint], &trust).await.unwrap_err();
    assert!(matches!(only(&error), EndpointFailure::NotTls), "{error:?}");
    assert!(!error.is_unreachable());
    drop(answer);

    let error = try_dial(&[], &trust).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoEndpoints));
    let unknown = "no-such-host.invalid:1".parse().unwrap();
    let error = try_dial(&[unknown], &trust).await.unwrap_err();
    assert!(
        matches!(only(&error), EndpointFailure::Resolve(_)),
        "{error:?}"
    );
}

async fn answer_http(listener: TcpListener) {
    let (mut stream, _) = listener.accept().await.unwrap();
    stream
        .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        .await
        .unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn endpoints_are_tried_in_order_beginning_with_the_one_that_worked() {
    let cluster = Cluster::new();
    let other = Cluster::new().serve().await;
    let mut server = cluster.serve().await;
    let (gone, closed) = listener().await;
    drop(gone);
    let endpoints = [closed, other.endpoint.clone(), server.endpoint.clone()];
    let dialer = Dialer::new(&endpoints, &cluster.trust(), None).unwrap();
    for _ in 0..2 {
        soon("the connection", dialer.dial()).await.unwrap();
        soon("the server", server.incoming.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(dialer.preferred.load(Ordering::Relaxed), 2);
    }
    // A wrong authority outweighs a closed port in what is told.
    let error = try_dial(&endpoints[..2], &cluster.trust())
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::CaMismatch { endpoint } if endpoint == other.endpoint));
}

#[tokio::test]
async fn unusable_trust_is_told_as_such() {
    let trust = Trust::Ca {
        ca_pem: "nonsense".to_owned(),
        cluster: ClusterId([1; 16]),
    };
    let error = try_dial(&["localhost:1".parse().unwrap()], &trust)
        .await
        .unwrap_err();
    assert!(
        matches!(error, ConnectError::Credentials { .. }),
        "{error:?}"
    );
}
