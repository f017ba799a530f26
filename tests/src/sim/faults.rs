//! What goes wrong from time to time: each kind that is on for a seed comes again and again until chaos ends.

use trainyard_common::bundle::{ObservedBundle, ObservedBundlePhase, TaskReport};
use trainyard_common::ids::{AttemptRef, NodeId, TaskIndex};
use trainyard_common::member::{EndCause, Ending, ObservedMember, ObservedPhase, RankEnd};
use trainyard_common::record::BundleRecord;
use trainyard_common::state::{AttemptState, ExitStatus, NodePolicy};
use trainyard_coordinator_core::effect::Command;

use super::clock::{Micros, ms, secs};
use super::host::{Disk, Host, Role};
use super::network::{Down, Line, Up};
use super::swarm::Fault;
use super::users::Ask;
use super::world::{Happening, World};

/// A day, in milliseconds.
const DAY_MS: i64 = 86_400_000;

impl World {
    pub(crate) fn fault(&mut self, fault: Fault) {
        if !self.faults_on() {
            return;
        }
        let gap = self
            .swarm
            .faults
            .iter()
            .find(|(kind, _)| *kind == fault)
            .map_or(secs(600), |(_, gap)| *gap);
        let wait = self.rng.below(2 * gap);
        self.after(wait, Happening::Fault(fault));
        let hosts = self.hosts.len();
        let host = self.rng.index(hosts);
        match fault {
            Fault::CoordinatorKilled => {
                self.see("coordinator killed");
                self.crash("it is killed");
            }
            Fault::CoordinatorPaused => {
                self.see("coordinator paused");
                let length = self.rng.skewed(secs(1), secs(900));
                self.pause_coordinator(length);
            }
            Fault::CoordinatorDiskFull => {
                self.see("coordinator's disk full");
                let length = self.rng.skewed(secs(2), secs(120));
                self.disk_fills(length);
            }
            Fault::CoordinatorClockJumps => {
                self.see("coordinator's clock jumped");
                // Within half a day of the right time: request ids are only kept for about a day by this clock.
                self.coordinator.clock.offset_ms = self.jump() / 2;
                if self.rng.chance(500) {
                    self.crash("it is killed after a jump of its clock");
                }
            }
            Fault::RowFlipped => {
                if let Some(key) = self.coordinator.store.flip(&mut self.rng) {
                    self.see("row flipped");
                    self.say(format!("a bit of {key} flips on disk"));
                    if self.rng.chance(700) {
                        self.crash("it is killed after a bit flipped");
                    }
                }
            }
            Fault::BackupRestored => self.backup_restored(),
            Fault::LineCut | Fault::LineCutUp | Fault::LineCutDown => self.cut(fault, host),
            Fault::AllCut => {
                self.see("all lines cut");
                let length = self.rng.skewed(secs(1), secs(600));
                for host in 0..hosts {
                    self.cut_for(host, length, true, true);
                }
            }
            Fault::ConnectionBroken => {
                self.see("connection broken");
                let conns = self.conns_of(host);
                conns.into_iter().for_each(|conn| self.break_conn(conn));
                if self.rng.chance(200) {
                    self.renew_session(host);
                }
            }
            Fault::AllConnectionsBroken => {
                self.see("all connections broken");
                let conns: Vec<u64> = self.conns.keys().copied().collect();
                conns.into_iter().for_each(|conn| self.break_conn(conn));
            }
            Fault::SlowReader => {
                self.see("slow reader");
                let length = self.rng.skewed(secs(5), secs(120));
                self.hosts[host].line.slow_until = self.now + length;
            }
            Fault::PolicySet => self.set_policy(host),
            Fault::NodeRemoved => self.remove_node(host),
            Fault::NodeConfirmedLost => self.confirm_lost(host),
            Fault::OperatorRash => self.act_rashly(host),
            Fault::OlderCoordinator => self.older_coordinator_speaks(host),
            Fault::ForgedReport if self.rng.chance(400) => self.forge_bundle(host),
            Fault::ForgedReport => self.forge(host),
            Fault::AgentKilled
            | Fault::AgentPaused
            | Fault::AgentCrashLoop
            | Fault::AgentStateDamaged
            | Fault::ShimKilled
            | Fault::Rebooted
            | Fault::PoweredOff
            | Fault::AgentDiskFull
            | Fault::DiskLost
            | Fault::DiskCloned
            | Fault::FileFlipped
            | Fault::ClockJumps => self.host_fault(fault, host),
        }
    }

    fn host_fault(&mut self, fault: Fault, host: usize) {
        if !self.hosts[host].powered || self.hosts[host].scrapped {
            return;
        }
        match fault {
            Fault::AgentKilled => {
                self.see("agent killed");
                self.restart_agent(host);
            }
            Fault::AgentPaused => {
                self.see("agent paused");
                let length = self.rng.skewed(secs(1), secs(400));
                self.say(format!(
                    "agent {host} is stopped for {} s",
                    length / 1_000_000
                ));
                self.hosts[host].paused_until = self.now + length;
            }
            Fault::AgentCrashLoop => {
                self.see("agent in a crash loop");
                let length = self.rng.skewed(secs(5), secs(60));
                self.hosts[host].crash_loop_until = self.now + length;
                self.restart_agent(host);
            }
            Fault::AgentStateDamaged => {
                self.see("agent's state damaged");
                self.hosts[host].disk.agent.damage();
                self.restart_agent(host);
            }
            Fault::ShimKilled => {
                let attempts = self.shims_to_kill(host);
                let carriers: Vec<u64> = self.hosts[host].carriers.keys().copied().collect();
                if let Some(carrier) = self.rng.pick(&carriers)
                    && (attempts.is_empty() || self.rng.chance(500))
                {
                    self.kill_carrier(host, carrier);
                } else if let Some(attempt) = self.rng.pick(&attempts) {
                    self.see("shim killed");
                    self.kill_shim(host, attempt);
                }
            }
            Fault::Rebooted => {
                self.see("host rebooted");
                self.power_off(host);
                let wait = self.rng.skewed(secs(5), secs(60));
                self.after(wait, Happening::PowerOn(host));
            }
            Fault::PoweredOff => {
                self.see("host powered off");
                self.power_off(host);
                let wait = self.rng.skewed(secs(30), secs(1200));
                self.after(wait, Happening::PowerOn(host));
            }
            Fault::AgentDiskFull => {
                self.see("agent's disk full");
                self.hosts[host].disk_full = true;
                let length = self.rng.skewed(secs(5), secs(120));
                self.after(length, Happening::FaultEnds(fault, host));
            }
            Fault::DiskLost => {
                self.see("disk lost");
                self.power_off(host);
                self.hosts[host].disk = Disk::default();
                self.hosts[host].name.push('x');
                self.oracle.identities_changed += 1;
                // Its credentials are gone with it: an operator vouches for the old node and enrols a new one.
                if let Some(node) = self.hosts[host].node.take() {
                    self.call(secs(10), Ask::ConfirmLost { node });
                    self.call(secs(40), Ask::Remove { node });
                }
                self.hosts[host].refused = Some("NODE_UNKNOWN".to_owned());
                let wait = self.rng.skewed(secs(30), secs(120));
                self.after(wait, Happening::PowerOn(host));
                self.call_operator(host);
            }
            Fault::DiskCloned => self.clone_disk(host),
            Fault::FileFlipped => self.flip_file(host),
            Fault::ClockJumps => {
                self.see("host's clock jumped");
                let jump = self.jump();
                self.hosts[host].clock.offset_ms += jump;
            }
            _ => {}
        }
    }

    /// Mostly those whose ranks do not end with them, if there are any.
    fn shims_to_kill(&mut self, host: usize) -> Vec<AttemptRef> {
        let any = self.rng.chance(300);
        let found = &self.hosts[host];
        let outlived = |attempt: &&AttemptRef| {
            let mut living = found.living(**attempt);
            living.any(|(_, process)| process.role == Role::Child || process.stuck_for > 0)
        };
        let nasty: Vec<AttemptRef> = found.shims.keys().filter(outlived).copied().collect();
        match any || nasty.is_empty() {
            true => found.shims.keys().copied().collect(),
            false => nasty,
        }
    }

    pub(crate) fn fault_ends(&mut self, fault: Fault, host: usize) {
        match fault {
            Fault::CoordinatorDiskFull => self.coordinator.disk_full = false,
            Fault::AgentDiskFull => self.hosts[host].disk_full = false,
            // The end of a process that dies within seconds of its start.
            Fault::AgentCrashLoop if self.faults_on() => self.restart_agent(host),
            Fault::AgentKilled if self.faults_on() => self.restart_agent(host),
            _ => {}
        }
    }

    fn jump(&mut self) -> i64 {
        let most = u64::try_from(DAY_MS).unwrap_or_default();
        let length = i64::try_from(self.rng.skewed(1000, most)).unwrap_or_default();
        if self.rng.chance(500) {
            length
        } else {
            -length
        }
    }

    fn restart_agent(&mut self, host: usize) {
        let open = self.hosts[host]
            .agent
            .as_ref()
            .filter(|agent| agent.is_open())
            .and_then(super::agent::Agent::conn);
        if let Some(conn) = open.filter(|_| self.rng.chance(300)) {
            self.send_up(conn, Up::Goodbye);
        }
        self.agent_ends(host, false);
        let wait = self.rng.skewed(ms(200), secs(10));
        self.after(wait, Happening::AgentStarts(host));
    }

    // === power ===

    /// Everything on the machine stops at once; only what was synced is left.
    pub(crate) fn power_off(&mut self, index: usize) {
        self.say(format!("host {index} loses power"));
        self.agent_ends(index, true);
        for conn in self.conns_of(index) {
            self.agent_side_ends(conn);
        }
        let host = &mut self.hosts[index];
        host.powered = false;
        host.processes.clear();
        host.shims.clear();
        host.carriers.clear();
        host.paused_until = 0;
        self.journals_torn(index);
    }

    pub(crate) fn power_on(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        if host.powered || host.scrapped {
            return;
        }
        host.powered = true;
        host.boot += 1;
        host.next_pid = 300;
        self.say(format!("host {index} boots"));
        let wait = self.rng.between(ms(500), secs(5));
        self.after(wait, Happening::AgentStarts(index));
    }

    // === disks ===

    fn flip_file(&mut self, index: usize) {
        let attempts: Vec<AttemptRef> = self.hosts[index].disk.dirs.keys().copied().collect();
        let Some(attempt) = self.rng.pick(&attempts) else {
            return;
        };
        let which = self.rng.below(2);
        let Some(dir) = self.hosts[index].disk.dirs.get_mut(&attempt) else {
            return;
        };
        let flipped = match which {
            0 => dir.status.damage(),
            _ => dir.upload.damage(),
        };
        if flipped {
            self.see("file of an attempt flipped");
            self.say(format!("host {index}: a file of {attempt} is damaged"));
            if self.rng.chance(600) {
                self.restart_agent(index);
            }
        }
    }

    /// Somebody copies a machine's disk and starts the copy.
    fn clone_disk(&mut self, index: usize) {
        if index >= self.swarm.hosts || self.hosts.len() >= self.swarm.hosts + 2 {
            return;
        }
        if self.hosts[index].node.is_none() || self.hosts[index].doubled {
            return;
        }
        self.see("disk cloned");
        let copy_index = self.hosts.len();
        let mut copy = Host::new(copy_index, &mut self.rng, &self.swarm);
        let original = &mut self.hosts[index];
        original.doubled = true;
        copy.inventory = original.inventory.clone();
        copy.node = original.node;
        copy.disk = original.disk.clone();
        copy.doubled = true;
        copy.boot = 1_000_000;
        copy.line = Line::default();
        self.hosts.push(copy);
        self.say(format!("host {copy_index} is a copy of host {index}"));
        self.after(secs(1), Happening::AgentStarts(copy_index));
    }

    // === lines ===

    fn cut(&mut self, fault: Fault, host: usize) {
        let length = self.rng.skewed(secs(1), secs(900));
        let (up, down) = match fault {
            Fault::LineCutUp => (true, false),
            Fault::LineCutDown => (false, true),
            _ => (true, true),
        };
        self.see(match fault {
            Fault::LineCutUp => "line cut towards the coordinator",
            Fault::LineCutDown => "line cut towards the agent",
            _ => "line cut",
        });
        self.cut_for(host, length, up, down);
    }

    fn cut_for(&mut self, host: usize, length: Micros, up: bool, down: bool) {
        let until = self.now + length;
        self.say(format!(
            "line of host {host} is cut for {} s",
            length / 1_000_000
        ));
        let line = &mut self.hosts[host].line;
        if up {
            line.up_cut_until = line.up_cut_until.max(until);
        }
        if down {
            line.down_cut_until = line.down_cut_until.max(until);
        }
    }

    // === people and liars ===

    fn set_policy(&mut self, host: usize) {
        let policies = [
            NodePolicy::Active,
            NodePolicy::Cordoned,
            NodePolicy::Draining,
        ];
        let policy = self.rng.pick(&policies).unwrap_or(NodePolicy::Active);
        if let Some(node) = self.hosts[host].node {
            self.call(0, Ask::Policy { node, policy });
        }
    }

    fn remove_node(&mut self, host: usize) {
        // Removal is a vouching as well; an operator does it to machines that run nothing.
        if let Some(node) = self.hosts[host].node
            && self.hosts[host].attempts_alive().is_empty()
            && !self.hosts[host].doubled
            && self.hosts[host].shims.is_empty()
            && self.hosts[host].carriers.is_empty()
        {
            self.call(0, Ask::Remove { node });
        }
    }

    /// An operator who looked: the machine is off.
    fn confirm_lost(&mut self, host: usize) {
        if let Some(node) = self.hosts[host].node
            && !self.hosts[host].powered
            && !self.hosts[host].doubled
        {
            self.call(0, Ask::ConfirmLost { node });
        }
    }

    /// An operator who does not look: any node, whatever runs there.
    fn act_rashly(&mut self, host: usize) {
        let Some(node) = self.hosts[host].node.filter(|_| !self.hosts[host].doubled) else {
            return;
        };
        let ask = match self.rng.chance(500) {
            true => Ask::Remove { node },
            false => Ask::ConfirmLost { node },
        };
        self.see("operator acts without looking");
        self.call_rashly(ask);
    }

    /// A coordinator that was replaced, by a restored copy of its state or by a start elsewhere, and still runs: its
    /// words reach an agent that has seen a later term.
    fn older_coordinator_speaks(&mut self, index: usize) {
        let open = self.hosts[index]
            .agent
            .as_ref()
            .filter(|agent| agent.is_open())
            .and_then(|agent| agent.conn().zip(agent.older_term()));
        let attempts: Vec<AttemptRef> = self.hosts[index].disk.dirs.keys().copied().collect();
        if let (Some((conn, term)), Some(attempt)) = (open, self.rng.pick(&attempts)) {
            self.see("older coordinator speaks");
            self.say(format!(
                "a coordinator of term {term} tells host {index} to forget {attempt}"
            ));
            let command = Box::new(Command::Forget(attempt));
            self.send_down(conn, Down::Command(term, command));
        }
    }

    /// A node says that tasks of another node's bundle ended well, or that the bundle is over.
    fn forge_bundle(&mut self, index: usize) {
        let Some(node) = self.hosts[index].node else {
            return;
        };
        let victims: Vec<BundleRecord> = self
            .coordinator
            .store
            .typed
            .bundles
            .values()
            .filter(|bundle| bundle.node != node)
            .cloned()
            .collect();
        let open = self.hosts[index]
            .agent
            .as_ref()
            .filter(|agent| agent.is_open())
            .and_then(super::agent::Agent::conn);
        let (Some(victim), Some(conn)) = (self.rng.pick(&victims), open) else {
            return;
        };
        let at = self.hosts[index].clock.wall(self.now);
        let rank = RankEnd {
            rank: 0,
            exit: ExitStatus::Code(0),
            at,
            unprompted: true,
            oom_killed: false,
        };
        let ending = Ending {
            cause: EndCause::Completed,
            message: "forged".to_owned(),
            started: true,
            ranks: vec![rank],
            ended_at: at,
            outputs: None,
            checkpoint: None,
            warning: String::new(),
        };
        let report = |task| TaskReport::Ended {
            task,
            started_at: Some(at),
            ending: Box::new(ending.clone()),
        };
        let first = victim.recorded;
        // Tasks that it holds, and one that it does not.
        let reports: Vec<TaskReport> = victim
            .tasks
            .tasks()
            .take(3)
            .chain([TaskIndex(9999)])
            .map(report)
            .collect();
        let phase = match self.rng.chance(500) {
            true => ObservedBundlePhase::Running,
            false => ObservedBundlePhase::Ended {
                total: first + reports.len() as u64,
                message: String::new(),
            },
        };
        self.oracle.forged += 1;
        self.see("report of a bundle forged");
        self.say(format!("host {index} lies about {}", victim.id));
        let bundle = victim.id;
        self.send_up(
            conn,
            Up::Bundle(ObservedBundle {
                bundle,
                phase,
                first,
                reports,
            }),
        );
    }

    /// A node says that another node's member ended well.
    fn forge(&mut self, index: usize) {
        let Some(node) = self.hosts[index].node else {
            return;
        };
        let victims: Vec<(AttemptRef, u32, NodeId)> = self
            .coordinator
            .store
            .typed
            .attempts
            .values()
            .filter(|attempt| attempt.state != AttemptState::Ended)
            .flat_map(|attempt| {
                (0..)
                    .zip(&attempt.members)
                    .map(|(rank, member)| (attempt.id, rank, member.node))
            })
            .filter(|(_, _, on)| *on != node)
            .collect();
        let Some((attempt, node_rank, _)) = self.rng.pick(&victims) else {
            return;
        };
        let open = self.hosts[index]
            .agent
            .as_ref()
            .filter(|agent| agent.is_open())
            .and_then(super::agent::Agent::conn);
        let Some(conn) = open else { return };
        let ended_at = self.hosts[index].clock.wall(self.now);
        let ranks = (0..3).map(|rank| RankEnd {
            rank: node_rank * 3 + rank,
            exit: ExitStatus::Code(0),
            at: ended_at,
            unprompted: true,
            oom_killed: false,
        });
        let ending = Ending {
            cause: EndCause::Completed,
            message: "forged".to_owned(),
            started: true,
            ranks: ranks.collect(),
            ended_at,
            outputs: None,
            checkpoint: None,
            warning: String::new(),
        };
        self.oracle.forged += 1;
        self.see("report forged");
        self.say(format!("host {index} lies about {attempt}"));
        let phase = ObservedPhase::Ended(ending);
        self.send_up(
            conn,
            Up::Observed(ObservedMember {
                attempt,
                node_rank,
                phase,
            }),
        );
    }
}
