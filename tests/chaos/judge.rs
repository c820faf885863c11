//! What an answer may say, given what engines hold and ever announced. Pure.

use std::{collections::HashSet, fmt, time::Instant};

use kv_indexer::proto::kvindexer::{PodScore, PodState, PodStatus};

use crate::{
    engine::{Held, Truth},
    universe::{INDEX_BLOCK, Universe},
};

/// An answer that is wrong.
#[derive(Clone, Debug)]
pub(crate) struct Mismatch {
    pub(crate) pod: String,
    /// Number in the universe, with its tokens; absent where no prompt is concerned.
    pub(crate) prompt: Option<(usize, Vec<u32>)>,
    pub(crate) expected: String,
    pub(crate) actual: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod {}: expected {}, actual {}", self.pod, self.expected, self.actual)?;
        if let Some((number, tokens)) = &self.prompt {
            let head = &tokens[..tokens.len().min(2 * INDEX_BLOCK)];
            write!(f, "; prompt {number} of {} tokens: {head:?}…", tokens.len())?;
        }
        Ok(())
    }
}

/// What was found about one pod at rest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) mismatches: Vec<Mismatch>,
    /// Different engine blocks of the universe that the index counts as held.
    pub(crate) credited: usize,
    /// Those of them that the engine does not hold.
    pub(crate) phantoms: usize,
}

/// Judges one pod at rest: `depths` says how many leading blocks of each prompt of the universe the
/// index counts as held. `barrier` is the first sequence of which nothing was lost any more.
pub(crate) fn at_rest(
    universe: &Universe,
    row: &PodStatus,
    depths: &[u32],
    held: &Held,
    truth: &Truth,
    (incarnation, barrier): (u64, u64),
) -> Verdict {
    let ratio = held.block_size / INDEX_BLOCK;
    let mut verdict = Verdict::default();
    let mut credited = HashSet::new();
    let mut wrong = |prompt: Option<usize>, expected: String, actual: String| {
        let prompt = prompt.map(|number| (number, universe.prompts()[number].clone()));
        let state = format!("{actual} ({:?} {:?})", row.state(), row.reason);
        let pod = row.pod.clone();
        verdict.mismatches.push(Mismatch { pod, prompt, expected, actual: state });
    };
    for (number, &depth) in depths.iter().enumerate() {
        let hashes = universe.sequence(number, held.block_size).hashes();
        let own = hashes.iter().take_while(|hash| held.blocks.contains(hash)).count() * ratio;
        let depth = depth as usize;
        let counted = &hashes[..depth.div_ceil(ratio).min(hashes.len())];
        credited.extend(counted.iter().copied());
        match row.state() {
            PodState::Live if depth != own => {
                wrong(Some(number), own.to_string(), depth.to_string());
            }
            PodState::Partial if depth > own => {
                wrong(Some(number), format!("{own} at most"), depth.to_string());
            }
            PodState::Degraded => {
                let all = truth.lives.iter().filter(|life| life.incarnation == incarnation);
                for hash in counted.iter().filter(|hash| !held.blocks.contains(hash)) {
                    // What may be high is what was removed, or lived, before something was lost.
                    if !all.clone().any(|life| life.announced.contains(hash)) {
                        wrong(
                            Some(number),
                            format!("not {hash:#x}: never announced"),
                            depth.to_string(),
                        );
                    } else if held.removed_at.get(hash).is_some_and(|&at| at >= barrier) {
                        wrong(
                            Some(number),
                            format!("not {hash:#x}: its removal was not lost"),
                            depth.to_string(),
                        );
                    }
                }
            }
            _ => {}
        }
    }
    if row.state() == PodState::Live && row.blocks != held.blocks.len() as u64 {
        wrong(None, format!("{} blocks", held.blocks.len()), row.blocks.to_string());
    }
    verdict.credited = credited.len();
    verdict.phantoms = credited.iter().filter(|hash| !held.blocks.contains(hash)).count();
    verdict
}

/// Judges one line of an answer while everything is in motion: what is credited was announced in one
/// life of the pod, or, if removals and restarts may have been lost, under one registration. `asked`
/// is when the call began.
pub(crate) fn in_motion(
    universe: &Universe,
    number: usize,
    row: &PodScore,
    truth: Option<&Truth>,
    asked: Instant,
    snapshots: bool,
) -> Option<Mismatch> {
    if row.confirmed_depth == 0 {
        return None;
    }
    let doubtful =
        matches!(row.state(), PodState::Degraded | PodState::Stale | PodState::Replaying);
    // What a snapshot brought back may be older than the registration, until the engine was asked.
    let restored = snapshots && doubtful;
    let alive = || {
        let lives = truth.map_or(&[][..], |truth| &truth.lives);
        lives.iter().filter(move |life| restored || life.ended.is_none_or(|ended| asked < ended))
    };
    let wanted = |block_size: usize| {
        let hashes = universe.sequence(number, block_size).hashes();
        let engine_blocks = (row.confirmed_depth as usize).div_ceil(block_size / INDEX_BLOCK);
        &hashes[..engine_blocks.min(hashes.len())]
    };
    let in_one_life = alive()
        .any(|life| wanted(life.block_size).iter().all(|hash| life.announced.contains(hash)));
    let in_one_incarnation = || {
        alive().any(|one| {
            wanted(one.block_size).iter().all(|hash| {
                let same = |life: &&crate::engine::Life| life.incarnation == one.incarnation;
                alive().filter(same).any(|life| life.announced.contains(hash))
            })
        })
    };
    let mixed = matches!(row.state(), PodState::Degraded | PodState::Stale);
    if in_one_life || (mixed && in_one_incarnation()) {
        return None;
    }
    Some(Mismatch {
        pod: row.pod.clone(),
        prompt: Some((number, universe.prompts()[number].clone())),
        expected: "blocks that one life announced".to_owned(),
        actual: format!("{} blocks ({:?})", row.confirmed_depth, row.state()),
    })
}

/// Shows that the judges can condemn: what the engine holds is falsified in each way, and each has to
/// be noticed. `row`, `depths` and the rest are a pod's that was found right and `live`.
pub(crate) fn self_test(
    universe: &Universe,
    row: &PodStatus,
    depths: &[u32],
    held: &Held,
    truth: &Truth,
    incarnation: u64,
) -> Result<(), String> {
    let check =
        |name: &str, row: &PodStatus, held: &Held, truth: &Truth, barrier: u64, wrong: bool| {
            let verdict = at_rest(universe, row, depths, held, truth, (incarnation, barrier));
            match verdict.mismatches.is_empty() == wrong {
                true => Err(format!("{name}: {verdict:?}")),
                false => Ok(()),
            }
        };
    let deepest = (0..depths.len()).max_by_key(|&at| depths[at]).ok_or("no prompts")?;
    let hashes = universe.sequence(deepest, held.block_size).hashes();
    let blocks = depths[deepest] as usize * INDEX_BLOCK / held.block_size;
    if blocks == 0 {
        return Err("the pod holds nothing".to_owned());
    }
    let last = hashes[blocks - 1];
    check("as it is", row, held, truth, 0, false)?;

    let mut without = held.clone();
    without.blocks.remove(&last);
    without.removed_at.remove(&last);
    let partial = PodStatus { state: PodState::Partial.into(), ..row.clone() };
    let degraded = PodStatus { state: PodState::Degraded.into(), ..row.clone() };
    check("live and high", row, &without, truth, 0, true)?;
    check("partial and high", &partial, &without, truth, 0, true)?;
    check("degraded, by a lost removal", &degraded, &without, truth, 0, false)?;
    without.removed_at.insert(last, 7);
    check("degraded, by a removal that came", &degraded, &without, truth, 7, true)?;
    check("degraded, by one that was lost", &degraded, &without, truth, 8, false)?;
    check("degraded, of nobody", &degraded, &without, &Truth::default(), 8, true)?;

    let mut more = held.clone();
    more.blocks.extend(hashes.iter().copied());
    more.blocks.insert(1);
    check("live and low", row, &more, truth, 0, true)?;
    check("partial and low", &partial, &more, truth, 0, false)?;

    let now = Instant::now();
    let score = PodScore {
        pod: row.pod.clone(),
        confirmed_depth: depths[deepest],
        state: row.state,
        ..PodScore::default()
    };
    if in_motion(universe, deepest, &score, Some(truth), now, false).is_some() {
        return Err("in motion: a right answer is condemned".to_owned());
    }
    if in_motion(universe, deepest, &score, Some(&Truth::default()), now, false).is_none() {
        return Err("in motion: blocks of nobody are not noticed".to_owned());
    }
    Ok(())
}
