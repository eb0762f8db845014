//! Nova's scheduler: which host takes an instance. Filters say who could, weighers who should; pure, and for equal
//! weights decided by name, so that the same question has the same answer.

use ferry_proto::agent::v1::HostInfo;

use crate::agent::reason::Reason;
use crate::agent::versions::RpcVersion;

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted<'a> {
    /// Where the instance is.
    pub(super) source: &'a HostInfo,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u32,
}

/// A host, and what it said of itself when it was asked, or why it did not.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) host: String,
    pub(super) answer: Result<HostInfo, String>,
}

/// Why a host is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) reason: Reason,
    pub(super) text: String,
}

/// A host and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Verdict {
    pub(super) host: String,
    /// Its weight among those that could take the instance, or every reason why it is left: at least one.
    pub(super) outcome: Result<f64, Vec<Left>>,
    /// What was weighed, in words; empty where nothing was.
    pub(super) facts: String,
}

/// A check of one host; what it says is why the host is left.
type Filter = fn(&Wanted<'_>, &HostInfo) -> Result<(), Left>;

/// In the order in which they are asked: the first that says no is the reason that is told first.
const FILTERS: [Filter; 5] = [is_other, speaks, is_not_older, has_memory, has_vcpus];

/// Judges each host: those that could take the instance first, the best of them at the top.
pub(super) fn judge(wanted: &Wanted<'_>, candidates: &[Candidate]) -> Vec<Verdict> {
    let filtered: Vec<_> = candidates.iter().map(|candidate| filter(wanted, candidate)).collect();
    let fit: Vec<&HostInfo> = filtered
        .iter()
        .filter_map(|outcome| outcome.as_ref().ok().copied())
        .collect();
    let mut verdicts: Vec<Verdict> = candidates
        .iter()
        .zip(filtered)
        .map(|(candidate, outcome)| Verdict {
            host: candidate.host.clone(),
            facts: outcome.as_ref().map(|info| facts(info)).unwrap_or_default(),
            outcome: outcome.map(|info| weight(info, &fit)),
        })
        .collect();
    verdicts.sort_by(|one, other| {
        let weight = |verdict: &Verdict| verdict.outcome.as_ref().copied().unwrap_or(f64::NEG_INFINITY);
        weight(other)
            .total_cmp(&weight(one))
            .then_with(|| one.host.cmp(&other.host))
    });
    verdicts
}

fn filter<'a>(wanted: &Wanted<'_>, candidate: &'a Candidate) -> Result<&'a HostInfo, Vec<Left>> {
    let alone = |reason, text| Err(vec![Left { reason, text }]);
    let info = match &candidate.answer {
        Ok(info) => info,
        Err(silence) => return alone(Reason::DestinationDown, silence.clone()),
    };
    if info.host != candidate.host {
        let text = format!("the agent there is host {:?}", info.host);
        return alone(Reason::DestinationIsOther, text);
    }
    let why: Vec<_> = FILTERS.iter().filter_map(|filter| filter(wanted, info).err()).collect();
    if why.is_empty() { Ok(info) } else { Err(why) }
}

fn left<T>(reason: Reason, text: impl Into<String>) -> Result<T, Left> {
    Err(Left {
        reason,
        text: text.into(),
    })
}

fn is_other(wanted: &Wanted<'_>, host: &HostInfo) -> Result<(), Left> {
    match host.host == wanted.source.host {
        true => left(Reason::DestinationIsSource, "the instance is there already"),
        false => Ok(()),
    }
}

fn speaks(wanted: &Wanted<'_>, host: &HostInfo) -> Result<(), Left> {
    let version = |info: &HostInfo| info.rpc_version.parse::<RpcVersion>().ok();
    match version(wanted.source)
        .zip(version(host))
        .and_then(|(ours, theirs)| ours.common(theirs))
    {
        Some(_) => Ok(()),
        None => left(
            Reason::RpcVersion,
            format!(
                "it speaks RPC version {}, the source {}",
                host.rpc_version, wanted.source.rpc_version
            ),
        ),
    }
}

/// A build that is older than the source's may not know what the guest's saved state holds.
fn is_not_older(wanted: &Wanted<'_>, host: &HostInfo) -> Result<(), Left> {
    let numbers = |version: &str| {
        version
            .split('.')
            .map(|part| part.parse().unwrap_or(0))
            .collect::<Vec<u64>>()
    };
    match numbers(&host.version) < numbers(&wanted.source.version) {
        true => left(
            Reason::OlderVersion,
            format!("it is version {}, the source {}", host.version, wanted.source.version),
        ),
        false => Ok(()),
    }
}

fn has_memory(wanted: &Wanted<'_>, host: &HostInfo) -> Result<(), Left> {
    match free_memory(host) < wanted.memory_bytes {
        true => left(
            Reason::Memory,
            format!(
                "it has {} MiB that no guest claims, the instance wants {} MiB",
                free_memory(host) >> 20,
                wanted.memory_bytes >> 20
            ),
        ),
        false => Ok(()),
    }
}

fn has_vcpus(wanted: &Wanted<'_>, host: &HostInfo) -> Result<(), Left> {
    let free = host.vcpus_limit.saturating_sub(host.vcpus_claimed);
    match free < wanted.vcpus {
        true => left(
            Reason::Vcpus,
            format!("it has {free} vCPUs to give, the instance wants {}", wanted.vcpus),
        ),
        false => Ok(()),
    }
}

fn free_memory(host: &HostInfo) -> u64 {
    host.memory_limit_bytes.saturating_sub(host.memory_claimed_bytes)
}

fn migrations(host: &HostInfo) -> u32 {
    host.migrations_out.saturating_add(host.migrations_in)
}

/// Free memory, few migrations and few guests, each from 0 (the worst of the hosts that fit) to 1 (the best).
fn weight(host: &HostInfo, fit: &[&HostInfo]) -> f64 {
    let more_is_better: [fn(&HostInfo) -> f64; 3] = [
        |host| free_memory(host) as f64,
        |host| -f64::from(migrations(host)),
        |host| -f64::from(host.instances),
    ];
    more_is_better
        .iter()
        .map(|figure| {
            let all = fit.iter().map(|host| figure(host));
            let (least, most) = all.fold((f64::MAX, f64::MIN), |(least, most), one| {
                (least.min(one), most.max(one))
            });
            if most > least {
                (figure(host) - least) / (most - least)
            } else {
                0.0
            }
        })
        .sum()
}

fn facts(host: &HostInfo) -> String {
    format!(
        "{} MiB free, {} migrations, {} instances",
        free_memory(host) >> 20,
        migrations(host),
        host.instances
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(host: &str) -> HostInfo {
        HostInfo {
            host: host.to_owned(),
            version: "0.1.0".to_owned(),
            rpc_version: "4.2".to_owned(),
            memory_limit_bytes: 8 << 30,
            vcpus_limit: 16,
            ..HostInfo::default()
        }
    }

    fn candidate(info: HostInfo) -> Candidate {
        Candidate {
            host: info.host.clone(),
            answer: Ok(info),
        }
    }

    fn judged(candidates: &[Candidate]) -> Vec<Verdict> {
        let source = info("a");
        let wanted = Wanted {
            source: &source,
            memory_bytes: 4 << 30,
            vcpus: 2,
        };
        judge(&wanted, candidates)
    }

    fn names(verdicts: &[Verdict]) -> Vec<&str> {
        verdicts.iter().map(|verdict| verdict.host.as_str()).collect()
    }

    #[test]
    fn each_filter_names_its_reason() {
        let cases = [
            (Reason::DestinationIsSource, info("a")),
            (
                Reason::RpcVersion,
                HostInfo {
                    rpc_version: "5.0".to_owned(),
                    ..info("b")
                },
            ),
            (
                Reason::OlderVersion,
                HostInfo {
                    version: "0.0.9".to_owned(),
                    ..info("b")
                },
            ),
            (
                Reason::Memory,
                HostInfo {
                    memory_claimed_bytes: 5 << 30,
                    ..info("b")
                },
            ),
            (
                Reason::Vcpus,
                HostInfo {
                    vcpus_claimed: 15,
                    ..info("b")
                },
            ),
        ];
        for (reason, info) in cases {
            let verdicts = judged(&[candidate(info)]);
            let left: Vec<_> = verdicts[0]
                .outcome
                .as_ref()
                .unwrap_err()
                .iter()
                .map(|left| left.reason)
                .collect();
            assert_eq!(left, [reason]);
        }
    }

    #[test]
    fn all_that_a_host_lacks_is_told() {
        let small = HostInfo {
            version: "0.0.9".to_owned(),
            memory_claimed_bytes: 5 << 30,
            vcpus_claimed: 15,
            ..info("b")
        };
        let left = judged(&[candidate(small)]).remove(0).outcome.unwrap_err();
        let reasons: Vec<_> = left.iter().map(|left| left.reason).collect();
        assert_eq!(reasons, [Reason::OlderVersion, Reason::Memory, Reason::Vcpus]);
    }

    #[test]
    fn a_silent_host_and_one_that_is_another_are_left() {
        let silent = Candidate {
            host: "b".to_owned(),
            answer: Err("timed out".to_owned()),
        };
        let other = Candidate {
            host: "c".to_owned(),
            answer: Ok(info("d")),
        };
        let reasons: Vec<_> = judged(&[silent, other])
            .into_iter()
            .map(|verdict| verdict.outcome.unwrap_err()[0].reason)
            .collect();
        assert_eq!(reasons, [Reason::DestinationDown, Reason::DestinationIsOther]);
    }

    #[test]
    fn free_memory_few_migrations_and_few_guests_win() {
        let full = HostInfo {
            memory_claimed_bytes: 2 << 30,
            ..info("b")
        };
        let busy = HostInfo {
            migrations_in: 1,
            ..info("c")
        };
        let crowded = HostInfo {
            instances: 3,
            ..info("d")
        };
        let verdicts = judged(&[
            candidate(full),
            candidate(busy),
            candidate(crowded),
            candidate(info("e")),
        ]);
        assert_eq!(names(&verdicts)[0], "e");
        assert_eq!(verdicts[0].outcome, Ok(3.0));
    }

    #[test]
    fn equal_hosts_are_taken_by_name_whatever_their_order() {
        let forward = judged(&[candidate(info("b")), candidate(info("c"))]);
        let backward = judged(&[candidate(info("c")), candidate(info("b"))]);
        assert_eq!(names(&forward), ["b", "c"]);
        assert_eq!(forward, backward);
    }

    #[test]
    fn hosts_that_are_left_come_last() {
        let full = HostInfo {
            memory_claimed_bytes: 8 << 30,
            ..info("b")
        };
        assert_eq!(names(&judged(&[candidate(full), candidate(info("z"))])), ["z", "b"]);
    }
}
