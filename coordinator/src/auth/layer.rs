//! The tower layer that stands before every service, including those that are not ours.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::codegen::{Service, http};
use trainyard_proto::status::to_status;
use trainyard_transport::connections::Peer;

use super::{Caller, Gate};

/// Puts the gate before a service.
#[derive(Debug, Clone)]
pub(crate) struct AuthLayer(Arc<Gate>);

impl AuthLayer {
    pub(crate) fn new(gate: Gate) -> Self {
        Self(Arc::new(gate))
    }
}

impl<S> tower::Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth {
            gate: self.0.clone(),
            inner,
        }
    }
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub(crate) struct Auth<S> {
    gate: Arc<Gate>,
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for Auth<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let peer = request.extensions().get::<Peer>();
        match self.gate.admit(request.uri().path(), peer) {
            Ok(caller) => {
                let activity =
                    matches!(caller, Caller::User(_)).then(|| self.gate.activity.begin());
                if let Some(activity) = &activity {
                    request.extensions_mut().insert(activity.clone());
                }
                request.extensions_mut().insert(caller);
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let answer = answer.await;
                    drop(activity);
                    answer
                })
            }
            Err(refusal) => {
                let answer = to_status(&refusal).into_http();
                Box::pin(async move { Ok(answer) })
            }
        }
    }
}
