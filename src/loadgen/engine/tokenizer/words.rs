//! A model's own tokenizer and chat template; answers are made of English words.
//!
//! # Model
//!
//! Prompts become tokens as [`Local`] makes them. Answers are made of words of `LIST` that are one
//! token each, with a blank before them and without, so that an answer has as many tokens as were asked
//! for, and its text, encoded again, gives the ids that were generated: in the next turn of a chat, or
//! behind the prompt of a completion, the engine finds the blocks of its answer.
//!
//! # Failure
//!
//! Such words need a tokenizer that tells `word` from ` word` and joins no words: byte-level BPE, for
//! one. That is checked when it is loaded.

use std::{collections::HashMap, path::Path, sync::Arc};

use hyper::body::Bytes;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Tokenizer;
use crate::{
    loadgen::engine::sequence::Item,
    tokenize::{Input, Local, Tokenized, models::LocalConfig, pool::PoolConfig},
};

/// Words of answers.
const LIST: &str = "\
    the of and to in is it for on as at by we be or an all can one two new time way day work part \
    back more than then when what this that with from have they will out up so if no do go my me us \
    he she you not but are was has had who how its our now may see get use";
/// Words that a tokenizer has to have at least, so that answers differ.
const ENOUGH: usize = 16;

/// See the module's page.
#[derive(Debug)]
pub struct Words {
    local: Local,
    model: String,
    words: Vec<Word>,
    texts: HashMap<u32, String>,
}

/// The ids of a word.
#[derive(Clone, Copy, Debug)]
struct Word {
    /// At the beginning of a text.
    first: u32,
    /// With a blank before it.
    further: u32,
}

impl Words {
    /// Loads the tokenizer and the chat template of a model's directory.
    ///
    /// # Errors
    ///
    /// The file that cannot be used, with the reason; a tokenizer that answers cannot be made with.
    pub fn load(model: &str, directory: &Path) -> anyhow::Result<Self> {
        let config = LocalConfig {
            models: [(model.to_owned(), directory.to_owned())].into(),
            pool: PoolConfig { threads: 1, ..PoolConfig::default() },
            ..LocalConfig::default()
        };
        // Nobody reads its metrics: the page is that of an engine.
        let local = Local::load(&config, &Default::default(), "loadgen")?;
        let (words, texts) = (Vec::new(), HashMap::new());
        let mut it = Self { local, model: model.to_owned(), words, texts };
        it.learn().map_err(|why| anyhow::anyhow!("{}: {why}", directory.display()))?;
        Ok(it)
    }

    fn learn(&mut self) -> Result<(), String> {
        let mut known = Vec::new();
        for word in LIST.split(' ') {
            let further = format!(" {word}");
            let ids = [self.text(word, false)?, self.text(&further, false)?];
            if let [[first], [further_id]] = ids.each_ref().map(Vec::as_slice)
                && first != further_id
            {
                self.texts.insert(*first, word.to_owned());
                self.texts.insert(*further_id, further);
                self.words.push(Word { first: *first, further: *further_id });
                known.push(word);
            }
        }
        if known.len() < ENOUGH {
            let there = known.len();
            return Err(format!("only {there} words for answers are one token of this tokenizer"));
        }
        // Every word behind every other.
        let (mut text, mut ids) = (String::new(), Vec::new());
        for (one, first) in known.iter().zip(&self.words) {
            for (two, second) in known.iter().zip(&self.words) {
                text.push_str(&format!(" {one} {two}"));
                ids.extend([first.further, second.further]);
            }
        }
        let opened = self.words.first().map(|word| word.first);
        let begins = opened.into_iter().chain(ids.iter().skip(1).copied());
        if self.text(&text, false)? != ids
            || self.text(text.trim_start(), false)? != begins.collect::<Vec<_>>()
        {
            return Err(
                "this tokenizer joins words, so that answers cannot be made of them".to_owned()
            );
        }
        Ok(())
    }

    fn tokenize(&self, input: &Input) -> Result<Tokenized, String> {
        self.local.tokenize_now(&self.model, input).map_err(|error| error.to_string())
    }
}

impl Tokenizer for Words {
    fn text(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let input = Input::Text { text: Arc::from(text), add_special_tokens };
        Ok(self.tokenize(&input)?.ids.to_vec())
    }

    fn chat(&self, body: &[u8]) -> Result<(Vec<u32>, Vec<Item>), String> {
        let tokenized = self.tokenize(&Input::Chat(Bytes::copy_from_slice(body)))?;
        Ok((tokenized.ids.to_vec(), Vec::new()))
    }

    fn answer(&self, chat: bool, mut state: u64, tokens: usize) -> Vec<u32> {
        let word = |at| {
            state = xxh3_64_with_seed(&[], state);
            let word = self.words.get((state % self.words.len() as u64) as usize)?;
            // Templates put an answer behind a line break, and some take blanks away.
            Some(if chat && at == 0 { word.first } else { word.further })
        };
        (0..tokens).map_while(word).collect()
    }

    fn decode(&self, token: u32) -> String {
        self.texts.get(&token).cloned().unwrap_or_default()
    }
}
