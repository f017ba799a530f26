//! Output of ranks as an agent sends it: checked against where the attempt is placed, stored, acknowledged by offset.
//!
//! An agent may send for attempts that have a member on its node, also for those that are over or lost, and for tasks in
//! bundles that its node holds; nobody else's.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use tonic::Streaming;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptRef, JobId, NodeId};
use trainyard_common::record::AttemptRecord;
use trainyard_proto::convert;
use trainyard_proto::status::{from_status, to_status};
use trainyard_proto::v1;

use super::{Sender, Shared, shutting_down};
use crate::logs::{Appended, LogKey};
use trainyard_transport::task::blocking;

/// Attempts whose ranks are remembered; looking again costs little.
const REMEMBERED: usize = 256;

/// One stream of output.
pub(super) struct Pushing {
    shared: Arc<Shared>,
    node: NodeId,
    sender: Sender<v1::PushLogsResponse>,
    /// The ranks on this node of attempts that were looked up. Members never move.
    ranks: HashMap<AttemptRef, Range<u32>>,
}

impl Pushing {
    pub(super) fn new(
        shared: Arc<Shared>,
        node: NodeId,
        sender: Sender<v1::PushLogsResponse>,
    ) -> Self {
        Self {
            shared,
            node,
            sender,
            ranks: HashMap::new(),
        }
    }

    pub(super) async fn run(mut self, requests: Streaming<v1::PushLogsRequest>) {
        if let Err(refusal) = self.serve(requests).await {
            // The peer may be gone; then nobody wants to know.
            let _ = self.sender.send(Err(to_status(&refusal))).await;
        }
    }

    async fn serve(&mut self, mut requests: Streaming<v1::PushLogsRequest>) -> Result<(), Refusal> {
        let stop = self.shared.stop.clone();
        loop {
            let request = tokio::select! {
                biased;
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled() => return Err(shutting_down()),
                // Not to be used again after the other branch won, and it is not.
                request = requests.message() => request.map_err(|status| from_status(&status))?,
            };
            let Some(request) = request else {
                return Ok(());
            };
            let answer = self.store(request).await?;
            if self.sender.send(Ok(answer)).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn store(
        &mut self,
        request: v1::PushLogsRequest,
    ) -> Result<v1::PushLogsResponse, Refusal> {
        let v1::PushLogsRequest {
            attempt,
            rank,
            offset,
            data,
            end,
        } = request;
        let attempt: AttemptRef = convert::required("attempt", attempt)?;
        if !self.ranks(attempt).await?.contains(&rank) {
            let message = format!("rank {rank} of attempt {attempt} is not on {}", self.node);
            return Err(
                Refusal::new(ErrorCode::PermissionDenied, "NOT_PLACED_HERE", message).at("rank"),
            );
        }
        let key = LogKey { attempt, rank };
        let logs = self.shared.logs.clone();
        let Appended { stored, end } =
            blocking(move || logs.append(key, offset, &data, end)).await?;
        Ok(v1::PushLogsResponse {
            attempt: Some(attempt.into()),
            rank,
            stored,
            end,
        })
    }

    /// The ranks of an attempt that are on this node; empty if there are none.
    async fn ranks(&mut self, attempt: AttemptRef) -> Result<Range<u32>, Refusal> {
        if let Some(ranks) = self.ranks.get(&attempt) {
            return Ok(ranks.clone());
        }
        // Before rows are looked for: a task in a bundle has none as long as it is quick, and there are many.
        if let Some(bundle) = self.shared.read.tables().in_bundle(attempt) {
            let here = bundle.node == self.node;
            return Ok(if here { 0..1 } else { 0..0 });
        }
        let ranks = self.look_up(attempt).await?;
        if self.ranks.len() >= REMEMBERED {
            self.ranks.clear();
        }
        // What is not there now may be there later.
        if !ranks.is_empty() {
            self.ranks.insert(attempt, ranks.clone());
        }
        Ok(ranks)
    }

    async fn look_up(&self, id: AttemptRef) -> Result<Range<u32>, Refusal> {
        let (attempt, job) = {
            let tables = self.shared.read.tables();
            (
                tables.attempts.get(&id).cloned(),
                tables.jobs.get(&id.job).cloned(),
            )
        };
        let attempt = match attempt {
            Some(attempt) => Some(attempt),
            None => self
                .shared
                .stored(move |store| store.attempt(id))
                .await?
                .map(Arc::new),
        };
        let Some(place) = attempt.and_then(|attempt| place(&attempt, self.node)) else {
            return Ok(0..0);
        };
        let job = match job {
            Some(job) => Some(job),
            None => {
                let next = JobId(id.job.0.saturating_add(1));
                let found = self
                    .shared
                    .stored(move |store| store.jobs(next, 1))
                    .await?
                    .pop();
                found.filter(|found| found.id == id.job).map(Arc::new)
            }
        };
        let each = job.map_or(0, |job| job.spec.procs_per_node);
        let first = place.saturating_mul(each);
        Ok(first..first.saturating_add(each))
    }
}

/// The node's place in the gang.
fn place(attempt: &AttemptRecord, node: NodeId) -> Option<u32> {
    let place = attempt
        .members
        .iter()
        .position(|member| member.node == node)?;
    u32::try_from(place).ok()
}
